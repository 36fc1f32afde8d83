"""Names of the FLUX networks' layers in their first releases, which both generations share.

Entries are (diffusers' module, the first release's) as regular expressions, see
`models.transformer.OtherNames`.
"""

DOUBLE, SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
ATTENTION = (
  *(
    (rf"{DOUBLE}attn\.{part}", rf"double_blocks.\1.{stream}_attn.qkv#{i}")
    for i, c in enumerate("qkv")
    for part, stream in ((f"to_{c}", "img"), (f"add_{c}_proj", "txt"))
  ),
  (rf"{DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
  (rf"{DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
)
EMBEDDERS = (
  (r"(.+\.)?timestep_embedder\.linear_1", "time_in.in_layer"),
  (r"(.+\.)?timestep_embedder\.linear_2", "time_in.out_layer"),
  (r"(.+\.)?text_embedder\.linear_1", "vector_in.in_layer"),
  (r"(.+\.)?text_embedder\.linear_2", "vector_in.out_layer"),
  (r"(.+\.)?guidance_embedder\.linear_1", "guidance_in.in_layer"),
  (r"(.+\.)?guidance_embedder\.linear_2", "guidance_in.out_layer"),
  (r"x_embedder", "img_in"),
  (r"context_embedder", "txt_in"),
  (r"proj_out", "final_layer.linear"),
  (r"norm_out\.linear", "final_layer.adaLN_modulation.1~"),
)
