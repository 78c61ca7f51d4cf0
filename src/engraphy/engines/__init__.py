"""Memories inside serving engines: vLLM and SGLang.

An engine computes the next tokens of many requests in one forward. It cuts prompts into chunks,
takes the beginning of a prompt from its prefix cache, and stops requests and resumes them. What a
memory has to know about earlier tokens (their ids, and the inputs of its convs) therefore lies
beside the engine's KV cache, in the same slots (`slots`). So it is shared, preempted and evicted
together with the keys and values, and modules hold no state of a request.

    folder    reads the directory that `hf.save_pretrained` writes
    config    makes the engine see its backbone's config
    slots     the values of earlier tokens, by KV slot
    chunks    the tokens of one forward: the next chunk of each request
    served    the memory: rows of a whole forward read ahead, and fused layer by layer
    metrics   the counters of the stores over HTTP
    vllm      the plugin for vLLM
    sglang    the plugin for SGLang

This package never imports `engraphy.hf`, whose versions of transformers the engines do not accept.
"""
