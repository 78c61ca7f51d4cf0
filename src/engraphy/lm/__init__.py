"""The reference language model: dense or mixture of experts, with or without a memory, and the text it trains on."""

from .arms import Arm, Arms, Parameters, count_parameters, demo_config, three_arms
from .data import Batch, Batches, Documents, load_documents, pack, split_documents
from .model import LM, LMConfig
from .ngrams import BANDS, BandLoss, NgramCounts, loss_by_band
from .tokens import encode, end_id, load_tokenizer, train_tokenizer

__all__ = ["BANDS", "LM", "Arm", "Arms", "BandLoss", "Batch", "Batches", "Documents", "LMConfig", "NgramCounts",
           "Parameters", "count_parameters", "demo_config", "encode", "end_id", "load_documents", "load_tokenizer",
           "loss_by_band", "pack", "split_documents", "three_arms", "train_tokenizer"]
