"""Look inside a model: how much attention falls on the first token, how large activations grow, how far gates open.

    python examples/look_inside.py [MODEL]

MODEL is a folder, a run of `gated-attention compare`, or a hub name; the default is a small gated model with random
weights. `gated-attention analyze MODEL` measures the same and more, and writes a page with figures.
"""

import sys

import torch

from gated_attention import GatedQwen3Config, GatedQwen3ForCausalLM, GateSpec
from gated_attention.analysis import inspect_model
from gated_attention.jobs.named_model import find_checkpoint, load_checkpoint
from gated_attention.train.text.tokenizer import load_tokenizer


def main(name: str | None = None) -> None:
    if name:
        model, tokenizer = load_checkpoint(find_checkpoint(name), torch.device("cpu"))
    else:
        tokenizer, widths = load_tokenizer("bytes"), {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
        gates = GateSpec(granularity="headwise")
        model = GatedQwen3ForCausalLM(GatedQwen3Config(**widths, **heads, vocab_size=len(tokenizer), gates=gates))

    with open(__file__) as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    passages = ids[: len(ids) // 64 * 64].view(-1, 64)  # (B, T)
    found = inspect_model(model, [passages])

    print(f"{found.num_tokens} tokens in {found.num_sequences} passages")
    print("layer  F-Attn (uniform)  largest activation" + "".join(f"  gate at {site}" for site in found.gates))
    columns = zip(found.by_layer("f_attn"), found.by_layer("f_attn_uniform"), found.by_layer("m_act"), strict=True)
    for layer, (f_attn, uniform, m_act) in enumerate(columns):
        means = (gate.by_layer("gate_mean")[layer] for gate in found.gates.values())
        print(f"{layer:5}  {f_attn:6.3f} {uniform:9.3f}  {m_act:18.1f}" + "".join(f"  {mean:12.3f}" for mean in means))
    layer, head = divmod(int(found.measures["f_attn"].argmax()), found.measures["f_attn"].shape[1])
    share = found.measures["f_attn"][layer, head]
    print(f"head {head} of layer {layer} attends most to the first token: {share:.1%} of its attention")


if __name__ == "__main__":
    main(*sys.argv[1:])
