"""Ask vLLM, in its own environment: folders in, log-probabilities and greedy tokens out, a JSON line each."""

import gc
import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

job = json.load(sys.stdin)
for folder in job["folders"]:
    answer = {"folder": folder}
    try:
        llm = LLM(
            model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
            max_logprobs=job["vocab"], max_num_seqs=4, enable_prefix_caching=False, **job["options"],
        )  # fmt: skip
        asked = SamplingParams(
            temperature=0, max_tokens=job["num_new"], ignore_eos=True, prompt_logprobs=job["vocab"], detokenize=False
        )
        replies = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], asked, use_tqdm=False)
        answer["log_probabilities"] = [
            [[row[token].logprob for token in range(job["vocab"])] for row in reply.prompt_logprobs[1:]]
            for reply in replies
        ]
        answer["greedy"] = [list(reply.outputs[0].token_ids) for reply in replies]
        answer["class"] = llm.apply_model(lambda model: type(model).__name__)[0]
        del llm
    except Exception as error:  # whatever a server raises is the answer
        answer["error"] = f"{type(error).__name__}: {error}"
    with open(job["answers"], "a") as file:
        file.write(json.dumps(answer) + "\n")
    if "error" in answer:  # the next one needs a process that has built nothing
        break
    cleanup_dist_env_and_memory()
    gc.collect()
    torch._dynamo.reset()
