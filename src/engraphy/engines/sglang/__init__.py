"""A memory inside SGLang 0.5.23.

SGLang loads `plugin.register` in each of its processes (entry point group sglang.srt.plugins). A
directory that `hf.save_pretrained` wrote is then served like any other model. Only one process
computes: refusals names what a memory cannot be combined with.

    plugin      what is registered when SGLang starts
    models      the classes that SGLang runs
    batches     the tokens of one forward, from what SGLang knows about them
    refusals    settings under which a memory would see wrong tokens
    staging     rows of DeepSeek-V4.1 from our stores, for SGLang's own stager (not run)
"""
