"""Ask llama.cpp, in its own environment: folders in, log-probabilities and greedy tokens out, a JSON line each."""

import json
import runpy
import sys

import numpy as np
from conversion.base import TextModel
from llama_cpp import Llama

job = json.load(sys.stdin)
converter = job["converter"]
TextModel.get_vocab_base_pre = lambda *_: "starcoder"  # splits as this package's byte pairs do
FLOAT32 = 0  # of ggml's types; the default cache rounds keys and values to float16

for folder in job["folders"]:
    answer = {"folder": folder}
    try:
        gguf = f"{folder}.gguf"
        sys.argv = [converter, folder, "--outfile", gguf, "--outtype", "f32", "--no-mtp"]
        runpy.run_path(converter, run_name="__main__")
        llm = Llama(gguf, n_ctx=128, n_batch=128, logits_all=True, type_k=FLOAT32, type_v=FLOAT32)
        answer |= {"log_probabilities": [], "greedy": []}
        for prompt in job["prompts"]:
            llm.reset()
            llm.eval(prompt)
            logits = np.array(llm.scores[: len(prompt)], dtype=np.float64)[:, : job["vocab"]]
            shifted = logits - logits.max(-1, keepdims=True)
            log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            answer["log_probabilities"].append(log_probabilities[:-1].tolist())
            tokens = [int(logits[-1].argmax())]
            while len(tokens) < job["num_new"]:
                llm.eval(tokens[-1:])
                tokens.append(int(llm.scores[llm.n_tokens - 1, : job["vocab"]].argmax()))
            answer["greedy"].append(tokens)
        answer["class"] = llm.metadata["general.architecture"]
    except (Exception, SystemExit) as error:  # whatever a server raises is the answer
        answer["error"] = f"{type(error).__name__}: {error}"
    with open(job["answers"], "a") as file:
        file.write(json.dumps(answer) + "\n")
