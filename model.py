"""The language model: a Llama-style decoder by hand, with LoRA adapters over one frozen base.

RMSNorm, rotary positions, grouped-query attention with an arbitrary mask and a KV cache, SwiGLU.
SmolLM2, Llama-2, Llama-3, TinyLlama and Qwen2.5 are all this model with other numbers; `load` reads
their weights through transformers (hub id, folder or .gguf file) and then lets go of transformers.

Mixed precision is two lines, both here: `Model.forward` casts the embedded tokens to
`compute_dtype`, and every `Linear` casts its weights to the dtype of what comes in. So a frozen
base is stored in bfloat16 (the cast does nothing), LoRA weights are stored in float32 and used in
bfloat16, and their gradients arrive in float32.

Shapes: B rows, T tokens, S tokens a query can look at (cached + new), D width, H heads, K key/value
heads, E head width.
"""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    vocab_size: int
    dim: int = 96                 # width of the residual stream (D)
    n_layers: int = 3
    n_heads: int = 4              # query heads (H)
    n_kv_heads: int = 2           # key/value heads (K); each serves H/K query heads
    head_dim: int = 24            # width of one head (E)
    ffn_dim: int = 256            # inner width of the SwiGLU
    rope_base: float = 10000.0    # slowest rotary wavelength is about 2 pi times this, in tokens
    rope_scaling: dict = None     # Llama-3 stretches the slow ones; keys as in transformers
    norm_eps: float = 1e-5
    qkv_bias: bool = False        # Qwen2 has biases on q, k and v
    tied: bool = True             # the output layer is the embedding
    dropout: float = 0.0          # of the residual branches, while training


class Linear(nn.Module):
    """y = x W' + b + scale * (x A') B'  with W, b frozen or not, and (A, B) the active adapter
    (LoRA, 2106.09685).
    """

    def __init__(self, d_in, d_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()   # by adapter's name
        self.active, self.scale = None, 2.0

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.active is not None:
            a, b = self.lora_a[self.active], self.lora_b[self.active]
            y = y + F.linear(F.linear(x, a.to(x.dtype)) * self.scale, b.to(x.dtype))
        return y


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        h = x.float()                                   # the mean of squares in float32
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)


def rope_frequencies(config):
    """Rotary frequencies in radians a token, (E/2,) float32. Llama-3 slows those with long
    wavelengths down.
    """
    e = config.head_dim
    freq = config.rope_base ** (-torch.arange(0, e, 2, dtype=torch.float32) / e)
    s = config.rope_scaling
    if not s or s.get("rope_type", "default") == "default":
        return freq
    if s["rope_type"] != "llama3":
        raise ValueError(f"rope scaling {s['rope_type']!r} is not built in: only 'default' and "
                         f"'llama3'")
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)   # over that context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)       # 1: fast, left alone; 0: all stretched
    return freq * (keep + (1 - keep) / s["factor"])


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i+E/2}) by their angle. x (B,H,T,E); cos, sin (B,1,T,E/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class KV:
    """One layer's KV cache: keys and values (B,K,S,E) in buffers with room to spare, so that a pass
    writes its new tokens behind the old ones and copies nothing.
    """

    def __init__(self):
        self.length, self.buffer = 0, None                             # (2,B,K,room,E)

    def append(self, k, v):
        """k, v (B,K,T,E) of T new tokens -> those of all S + T."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.buffer is None or self.length > self.buffer.shape[3]:
            B, K, _, E = k.shape
            room = k.new_empty(2, B, K, self.length * 3 // 2 + 32, E)
            if start:
                room[:, :, :, :start] = self.buffer[:, :, :, :start]
            self.buffer = room
        self.buffer[0, :, :, start:self.length] = k
        self.buffer[1, :, :, start:self.length] = v
        return self.buffer[:, :, :, :self.length]

    def keep(self, rows):
        """Forget the other rows. rows (B,) bool."""
        self.buffer = self.buffer[:, rows]


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.attn_norm, self.ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)
        self.q = Linear(c.dim, c.n_heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.n_heads * c.head_dim, c.dim)
        self.gate, self.up = Linear(c.dim, c.ffn_dim), Linear(c.dim, c.ffn_dim)
        self.down = Linear(c.ffn_dim, c.dim)
        self.drop = nn.Dropout(c.dropout)

    def attend(self, x, cos, sin, mask, kv):
        (B, T, _), c = x.shape, self.c
        split = lambda y: y.view(B, T, -1, c.head_dim).transpose(1, 2)            # (B, heads, T, E)
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv is not None:
            k, v = kv.append(k, v)
        if mask is None:
            # of a card's kernels only flash takes grouped heads; cards without bfloat16 lack it
            if q.is_cuda and q.dtype != torch.bfloat16:
                k, v = (z.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for z in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               enable_gqa=k.shape[1] < c.n_heads)
        else:
            # no fused kernel takes both a mask and grouped heads: the H/K query heads of a
            # key/value head become H/K times as many queries (`Model.forward` made the mask so)
            q = q.reshape(B, c.n_kv_heads, -1, c.head_dim)                       # (B,K,H/K*T,E)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.reshape(B, c.n_heads, T, c.head_dim)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))

    def forward(self, x, cos, sin, mask=None, kv=None):
        x = x + self.drop(self.attend(self.attn_norm(x), cos, sin, mask, kv))
        h = self.ffn_norm(x)
        return x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))


class Model(nn.Module):
    """Tokens to final hidden states; `logits` turns chosen hidden states into chosen columns of the
    vocabulary.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        self.run_block = Block.forward                      # or its compiled form
        self.recompute = False      # keep only the blocks' inputs, compute the rest again backward
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Parameter(torch.empty_like(self.embed))
        self.drop = nn.Dropout(config.dropout)
        self.register_buffer("rope", rope_frequencies(config), persistent=False)
        for name, p in self.named_parameters():             # GPT-2's start
            if p.dim() == 2:
                residual = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """tokens (B,T) int64 -> hidden states after the last norm (B,T,D).

        positions (B,T): rotary positions; None counts on from the cache's length. mask (B,T,S)
        bool, True where a query may look; None is causal, and wants an empty cache. cache: a list
        of one `KV` a layer; an empty list is filled, a full one is extended by the T new tokens.
        None keeps nothing.
        """
        if mask is None and cache:
            raise ValueError("tokens after a cache need a mask: causal attention would be aligned "
                             "wrongly")
        start = cache[0].length if cache else 0
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        angle = positions[:, None, :, None].float() * self.rope                    # (B,1,T,E/2)
        cos, sin = angle.cos().to(self.compute_dtype), angle.sin().to(self.compute_dtype)
        if mask is not None:        # to what is added to scores, (B,1,H/K*T,S), once for all blocks
            hidden = torch.zeros_like(mask, dtype=self.compute_dtype).masked_fill(~mask, -math.inf)
            mask = hidden[:, None].repeat(1, 1, self.config.n_heads // self.config.n_kv_heads, 1)
        x = self.drop(F.embedding(tokens, self.embed).to(self.compute_dtype))
        if cache is not None and not cache:
            cache += [KV() for _ in self.blocks]
        if cache is None:
            # the first block's input too takes a gradient, or it would be a graph of its own
            x = x.requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x
            for block in self.blocks:
                x = (checkpoint(self.run_block, block, x, cos, sin, mask, use_reentrant=False)
                     if self.recompute else self.run_block(block, x, cos, sin, mask))
        else:
            for block, kv in zip(self.blocks, cache):
                x = block(x, cos, sin, mask, kv)
        return self.norm(x)

    def compile_blocks(self, **options):
        """torch.compile for passes without a cache: one block, of any batch and length, and all
        blocks run it. The whole model at once takes as many times longer to compile as it has
        blocks, and runs no faster.
        """
        self.run_block = torch.compile(Block.forward, dynamic=True, **options)

    def logits(self, hidden, columns=None):
        """hidden (..., D) -> float32 logits (..., V), or only `columns` (C,) of them (..., C)."""
        w = self.embed if self.head is None else self.head
        w = w if columns is None else w[columns]
        return F.linear(hidden.float(), w.float())      # bfloat16 would make ties of near things

    def flops(self, tokens, context, outputs=0, train=True):
        """Floating-point operations of one pass over `tokens` tokens that see `context` tokens each
        on average, with `outputs` logits; with its backward pass if train.

        A product of a weight with a token is 2 operations. Backward, every weight is multiplied
        once more for the gradient of what came in, and once more again if it is trained: so a
        trained token costs about 4N with a frozen base of N weights (its adapters 6), not 6N.
        """
        c = self.config

        def times(p):               # operations a weight and token
            return 2 if not train else 6 if p.requires_grad else 4
        weights = [p for m in self.linears() for p in (m.weight, *(
            () if m.active is None else (m.lora_a[m.active], m.lora_b[m.active])))]
        attention = 2 * context * c.n_layers * c.n_heads * c.head_dim * (6 if train else 2)
        head = self.embed if self.head is None else self.head
        return (tokens * (sum(times(p) * p.numel() for p in weights) + attention)
                + outputs * c.dim * times(head))

    # ------------------------------------------------------------------ adapters

    def linears(self):
        return [m for m in self.modules() if isinstance(m, Linear)]

    def freeze(self):
        """Stop training the base and store it in the compute dtype. Buffers (the rotary
        frequencies) stay float32.
        """
        for name, p in self.named_parameters():
            if "lora_" not in name:
                p.requires_grad_(False)
                p.data = p.data.to(self.compute_dtype)
        return self

    def add_adapter(self, name, rank, like=None):
        """Add LoRA matrices to every linear layer of the blocks; B = 0, so the adapter starts as
        the base.

        rank r > 0; the product is scaled by alpha / r = 2. like: name of an adapter to start as a
        copy of instead.
        """
        for m in self.linears():
            d_out, d_in = m.weight.shape
            a = torch.empty(rank, d_in, device=m.weight.device)     # float32, whatever the base is
            b = torch.zeros(d_out, rank, device=m.weight.device)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            m.lora_a[name], m.lora_b[name] = nn.Parameter(a), nn.Parameter(b)
        if like is not None:
            self.load_adapter(name, self.adapter_state(like))

    def use(self, name):
        """Switch the active adapter (None: the bare base). Nothing is copied. KeyError if there is
        no such one.
        """
        for m in self.linears():
            if name is not None and name not in m.lora_a:
                raise KeyError(f"no adapter {name!r}; there are {list(m.lora_a)}")
            m.active = name
        return self

    def adapter_parameters(self, name):
        return [p for m in self.linears() for p in (m.lora_a[name], m.lora_b[name])]

    def adapter_state(self, name):
        return [p.detach().clone() for p in self.adapter_parameters(name)]

    @torch.no_grad()
    def load_adapter(self, name, state):
        for p, s in zip(self.adapter_parameters(name), state, strict=True):
            p.copy_(s)


# ---------------------------------------------------------------------- weights from elsewhere

# our name of a part of a block -> transformers'
THEIRS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
          "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
          "down": "mlp.down_proj", "attn_norm": "input_layernorm",
          "ffn_norm": "post_attention_layernorm"}

# transformers' model_type; SmolLM2 and TinyLlama are "llama"
ARCHITECTURES = ("llama", "qwen2")


def config_from_hf(hf):
    """A transformers config of a Llama-like model -> ModelConfig. ValueError names what is not
    built in.
    """
    if hf.model_type not in ARCHITECTURES:
        raise ValueError(f"model type {hf.model_type!r} is not supported: one of "
                         f"{', '.join(ARCHITECTURES)}")
    sliding, mlp_bias = getattr(hf, "use_sliding_window", False), getattr(hf, "mlp_bias", False)
    if sliding or mlp_bias or hf.hidden_act != "silu":
        raise ValueError("sliding windows, biases in the MLP and activations other than silu are "
                         "not built in")
    rope = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    base = rope.pop("rope_theta", None) or getattr(hf, "rope_theta", 10000.0)
    return ModelConfig(
        vocab_size=hf.vocab_size, dim=hf.hidden_size, n_layers=hf.num_hidden_layers,
        n_heads=hf.num_attention_heads, n_kv_heads=hf.num_key_value_heads,
        ffn_dim=hf.intermediate_size, rope_base=base, rope_scaling=rope or None,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        qkv_bias=hf.model_type == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        tied=bool(hf.tie_word_embeddings))


def from_hf(hf_model):
    """A transformers LlamaForCausalLM or Qwen2ForCausalLM -> our Model with the same weights in
    float32: its own memory where they are float32 there.
    """
    config = config_from_hf(hf_model.config)
    w, ours = hf_model.state_dict(), {}
    ours["embed"], ours["norm.weight"] = w["model.embed_tokens.weight"], w["model.norm.weight"]
    if not config.tied:
        ours["head"] = w["lm_head.weight"]
    for i in range(config.n_layers):
        for mine, their in THEIRS.items():
            for kind in ("weight", "bias"):
                key = f"model.layers.{i}.{their}.{kind}"
                if key in w:
                    ours[f"blocks.{i}.{mine}.{kind}"] = w[key]
    with torch.device("meta"):
        model = Model(config)
    ours = {k: v.detach().float() for k, v in ours.items()}
    model.load_state_dict(ours, assign=True)            # strict: a weight that is missing raises
    model.rope = rope_frequencies(config)
    return model


def load(folder, gguf_file=None):
    """Read a Llama-like model from a folder of transformers' files, or from `gguf_file` inside it
    (dequantised).
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    config_from_hf(AutoConfig.from_pretrained(folder, **extra))     # no before weights are read
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False,
                                              **extra)
    return from_hf(hf).eval()


def save_peft(model, name, folder, base, revision=None):
    """Write an adapter as PEFT does: folder/adapter_config.json and adapter_model.safetensors, to
    be opened by PeftModel.from_pretrained on the model that `base` names (hub id or folder) at its
    `revision`.
    """
    import safetensors.torch
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, block in enumerate(model.blocks):
        for mine, their in THEIRS.items():
            if isinstance(layer := getattr(block, mine), Linear):
                at = f"base_model.model.model.layers.{i}.{their}"
                for kind, p in (("A", layer.lora_a[name]), ("B", layer.lora_b[name])):
                    tensors[f"{at}.lora_{kind}.weight"] = p.detach().cpu().contiguous()
    layer = model.blocks[0].q
    rank = layer.lora_a[name].shape[0]
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    parts = [their.split(".")[1] for their in THEIRS.values() if "proj" in their]
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "revision": revision, "r": rank, "lora_alpha": layer.scale * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": parts, "inference_mode": True}, indent=1))


def describe(model):
    """'135M parameters, width 576, 30 layers, 9/3 heads' for the log."""
    c = model.config
    n = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    heads = f"{c.n_heads}/{c.n_kv_heads} heads"
    return f"{n / 1e6:.1f}M parameters, width {c.dim}, {c.n_layers} layers, {heads}"
