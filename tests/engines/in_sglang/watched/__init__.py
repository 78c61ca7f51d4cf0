"""A package for SGLANG_EXTERNAL_MODEL_PACKAGE that serves our classes and notes each forward."""
