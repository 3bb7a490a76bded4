"""Saves the tensors of a PyTorch file as safetensors; run it where PyTorch is installed.

    python scripts/pt_to_safetensors.py rgb_imagenet.pt rgb_imagenet.safetensors

For containers that dit_jax does not read itself: those from before PyTorch 1.6, and TorchScript.
"""

import argparse


def main() -> None:
    import torch
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input")
    parser.add_argument("output")
    args = parser.parse_args()
    try:
        state = torch.jit.load(args.input, map_location="cpu").state_dict()
    except RuntimeError:
        state = torch.load(args.input, map_location="cpu", weights_only=True)
    tensors = {name: x.detach().contiguous().clone() for name, x in state.items() if x.numel()}
    save_file(tensors, args.output)


if __name__ == "__main__":
    main()
