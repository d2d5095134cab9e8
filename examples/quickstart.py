"""The one call: a picture from the shipped model with half of the attention left out."""

import torch
from diffusers import FluxPipeline

import dit_accel

pipe = FluxPipeline.from_pretrained(dit_accel.demo_model("emoji-flux"))
generator = torch.Generator().manual_seed(0)

with dit_accel.accelerate(pipe, "draft", density=0.5) as handle:
    picture = pipe("watermelon, fluent flat style", num_inference_steps=20, generator=generator).images[0]
    print(handle.report())

picture.save("watermelon.png")
