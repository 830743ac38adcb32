"""From a Dataset to what a language model reads: tokens, the catalog's trie, documents, batches.

`Catalog` holds the tokens of every title and the trie that those token lists form.
`Catalog.document` is the one prompt format; training, sampling and evaluation all use it.
"""

import json
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

from data import InputError

# ---------------------------------------------------------------------- the tokenizer

# how text is cut before bytes are merged: GPT-2's way, and with every digit alone
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


@dataclass
class Tokenizer:
    """Text to token ids. `encode` is tiktoken's where the model's tokenizer is a byte-level BPE,
    else the model's own.
    """
    encode_raw: object           # str -> [int]
    vocab_size: int
    name: str
    prefix: tuple = ()           # what the model wants before any text (Llama's BOS)
    ids: dict = None             # after `compact`: raw id -> small id

    def encode(self, text):
        raw = self.encode_raw(text)
        return raw if self.ids is None else [self.ids[t] for t in raw]

    def compact(self, texts):
        """The same tokens, numbered without gaps over those that occur in texts: a small vocabulary
        for a small model.
        """
        kept = sorted({t for text in texts for t in self.encode_raw(text)} | set(self.prefix))
        ids = {t: k for k, t in enumerate(kept)}
        return Tokenizer(self.encode_raw, len(ids), f"{self.name}, {len(ids)} tokens of it",
                         tuple(ids[t] for t in self.prefix), ids)


def word_tokenizer(texts):
    """Whole words as tokens, for the toy world: a tiktoken Encoding whose vocabulary is the bytes
    and every word.
    """
    pattern = r" ?[\p{L}\p{N}]+|[^\p{L}\p{N}]"
    import regex
    words = sorted({w for t in texts for w in regex.findall(pattern, t)})
    ranks = {bytes([b]): b for b in range(256)}
    for w in words:
        ranks.setdefault(w.encode(), len(ranks))
    enc = tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(enc.encode_ordinary, len(ranks), "words")


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + k): b for k, b in enumerate(hidden)}


def split_pattern(pre):
    """The regular expression of a tokenizer.json's pre_tokenizer; ValueError for one that is not
    known here.
    """
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return DIGIT_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] \
            and "Regex" in steps[0]["pattern"]:
        return steps[0]["pattern"]["Regex"]
    raise ValueError(f"pre-tokenizer {kinds}")


def tiktoken_from(hf):
    """A transformers byte-level BPE tokenizer -> (tiktoken Encoding, array from its ranks to the
    model's ids).

    tiktoken merges the pair whose union has the lowest rank, so a rank is the place of a merge in
    the model's list; the model's own id may differ (special tokens come first in SmolLM2).
    ValueError where the tokenizer is of another kind.
    """
    if not hasattr(hf, "backend_tokenizer"):
        raise ValueError("it is written in Python")
    spec = json.loads(hf.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not spec.get("pre_tokenizer"):
        raise ValueError("not a byte-level BPE")
    if spec["normalizer"] and spec["normalizer"]["type"] != "NFC":     # titles are in NFC already
        raise ValueError(f"normalizer {spec['normalizer']['type']}")
    byte, vocab, unknown = byte_alphabet(), model["vocab"], -1
    pattern = split_pattern(spec["pre_tokenizer"])
    ranks, ids = {}, []
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    extra = sorted(vocab, key=vocab.get) if model.get("ignore_merges") else []
    for text in [*byte, *("".join(p) for p in pairs), *extra]:
        if not set(text) <= set(byte):
            continue                        # an added token such as <|endoftext|>
        key = bytes(byte[c] for c in text)
        if key not in ranks:
            ranks[key] = len(ids)
            ids.append(vocab.get(text, unknown))
    enc = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return enc, np.array(ids)


def model_tokenizer(folder, gguf_file, texts):
    """The tokenizer of a pretrained model, by tiktoken if that gives the same tokens on every one
    of `texts`.
    """
    from transformers import AutoTokenizer
    hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False,
                                       **({} if gguf_file is None else {"gguf_file": gguf_file}))
    original = lambda text: hf.encode(text, add_special_tokens=False)
    same = lambda text: hf.decode(original(text), clean_up_tokenization_spaces=False).strip()
    lossy = next((t for t in texts if same(t) != t.strip()), None)
    if lossy is not None:
        raise InputError(f"the tokenizer of {folder} does not give {lossy!r} back: titles would "
                         f"run together; use another model")
    prefix = tuple(hf.encode(""))
    try:
        enc, ids = tiktoken_from(hf)
        encode = lambda text: ids[enc.encode_ordinary(text)].tolist()
        wrong = next((t for t in texts if encode(t) != original(t)), None)
        if wrong is not None:
            raise ValueError(f"tiktoken's tokens differ on {wrong!r}")
        return Tokenizer(encode, len(hf), "byte-level BPE by tiktoken", prefix)
    except ValueError as e:
        print(f"! using the model's own tokenizer, not tiktoken: {e}")
        return Tokenizer(original, len(hf), type(hf).__name__, prefix)


def item_tokenizer(ds):
    """Every title one token (a yardstick: the classical item-token recommender), the header one
    more.
    """
    ids = {t + "\n": i for i, t in enumerate(ds.titles)} | {ds.header: len(ds.titles)}
    return Tokenizer(lambda text: [ids[text]], len(ids), "one token a title")


# ---------------------------------------------------------------------- the trie

@dataclass
class Mode:
    """What the trie looks like to one kind of scoring. N nodes, I items, J the most decisions on a
    path.

    over="trie": a decision is a node with several children; a node with one child is passed for
    free. over="vocab": every node is a decision, since the vocabulary's softmax can always go
    astray. The titles "The Ice Storm" and "The Ice Age" as word tokens, over="trie", D a decision:

        root D -- The -- Ice D -- Storm -- newline      chain of Ice: [Ice, The]
                             `--- Age ---- newline      end of The: Ice; of Storm: its newline
    """
    decision: torch.Tensor     # (N,) bool
    end: torch.Tensor          # (N,) the first decision or leaf at v or, by forced tokens, below
    step_node: torch.Tensor    # (I, J) the decisions on the way to an item, -1 padded
    step_child: torch.Tensor   # (I, J) the child taken at each, -1 padded
    chain: torch.Tensor        # (N, L) a decision, then the forced nodes up to the one above: what
    #                            is still to be read to make it. -1 padded, -1 alone for the rest
    column: torch.Tensor       # (N,) where a node's token stands in the logits of this mode


class Trie:
    """The catalog's token lists as a tree in flat arrays. Nodes are numbered breadth first; 0 is
    the root.

    first (N+1,): node v's children are the nodes first[v] .. first[v+1]-1 (CSR).  token, depth,
    item (N,): the token read on entering a node, its number of tokens, the item that ends there or
    -1.  leaf (I,): the node at which a title ends.  enter, leave (N,): u is an ancestor of v, or v
    itself, iff enter[u] <= enter[v] < leave[u].  vocab (C,): the tokens that occur, ascending.
    modes: {"trie", "vocab"} -> Mode.
    """

    def __init__(self, sequences):
        """sequences: I lists of token ids. InputError if two are equal or one is the beginning of
        another.
        """
        titles = [tuple(s) for s in sequences]
        prefixes = {t[:n] for t in titles for n in range(len(t) + 1)}
        prefixes = sorted(prefixes, key=lambda p: (len(p), p))         # that is, breadth first
        node = {p: v for v, p in enumerate(prefixes)}
        N, I = len(prefixes), len(titles)
        self.n_nodes = N
        parent = np.array([node[p[:-1]] if p else -1 for p in prefixes])
        token = np.array([p[-1] if p else 0 for p in prefixes])
        depth = np.array([len(p) for p in prefixes])
        count, item = np.bincount(parent[1:], minlength=N), np.full(N, -1)
        path = np.full((I, depth.max()), -1)
        for i, t in enumerate(titles):
            leaf = node[t]
            if item[leaf] >= 0:
                raise InputError(f"items {item[leaf]} and {i} have the same tokens; titles must "
                                 f"differ")
            if count[leaf] or not leaf:
                raise InputError(f"item {i}: its tokens are the beginning of another title's; end "
                                 f"every title in a newline")
            item[leaf] = i
            path[i, :len(t)] = [node[t[:n + 1]] for n in range(len(t))]
        size = np.ones(N, int)
        for v in range(N - 1, 0, -1):
            size[parent[v]] += size[v]
        enter, free = np.zeros(N, int), np.ones(N, int)                # depth-first numbers
        for v in range(1, N):
            enter[v] = enter[parent[v]] + free[parent[v]]
            free[parent[v]] += size[v]
        vocab, local = np.unique(token[1:], return_inverse=True)
        tensor = lambda x: torch.as_tensor(np.ascontiguousarray(x), dtype=torch.long)
        self.first = tensor(np.concatenate([[1], 1 + np.cumsum(count)]))
        self.token, self.depth, self.item, self.enter, self.leave, self.vocab = map(
            tensor, (token, depth, item, enter, enter + size, vocab))
        self.leaf = tensor([node[t] for t in titles])
        local = np.concatenate([[0], local])            # the root has no token; 0 stands in for it
        self.modes = {"trie": self._mode(parent, item, path, (count > 1) | (np.arange(N) == 0),
                                         tensor(local)),
                      "vocab": self._mode(parent, item, path, count > 0, self.token)}

    @staticmethod
    def _mode(parent, item, path, decision, column):
        N = len(parent)
        end, up = np.arange(N), np.full(N, -1)
        for v in range(N - 1, 0, -1):
            if not decision[parent[v]]:
                end[parent[v]] = end[v]                 # a forced node hands its end up
        for v in range(1, N):
            up[v] = parent[v] if decision[parent[v]] else up[parent[v]]
        taken = (path >= 0) & decision[parent[path]]    # the tokens of a title that are choices
        J = taken.sum(1).max()
        step_child = np.full((len(path), J), -1)
        at = np.cumsum(taken, 1) - 1
        i, j = np.nonzero(taken)
        step_child[i, at[i, j]] = path[i, j]
        step_node = np.where(step_child >= 0, parent[step_child], -1)
        chain = [np.where(decision & (np.arange(N) > 0), np.arange(N), -1)]
        while (chain[-1] >= 0).any():
            above = np.where(chain[-1] > 0, parent[chain[-1]], -1)
            chain.append(np.where((above > 0) & (above != up), above, -1))
        t = lambda x: torch.as_tensor(x, dtype=torch.long)
        return Mode(torch.as_tensor(decision), t(end), t(step_node), t(step_child),
                    t(np.stack(chain[:-1] or chain, 1)), column)

    def children(self, nodes):
        """nodes (R,) -> their children (R, C), -1 padded to the largest family among them."""
        start, stop = self.first[nodes], self.first[nodes + 1]
        c = start[:, None] + torch.arange(int((stop - start).max()), device=nodes.device)
        return torch.where(c < stop[:, None], c, -1)

    def to(self, device):
        for holder in (self, *self.modes.values()):
            for key, value in vars(holder).items():
                if torch.is_tensor(value):
                    setattr(holder, key, value.to(device))


# ---------------------------------------------------------------------- documents and batches

class Catalog:
    """How the items are written: tokens of every title (with its newline), the header's, and the
    trie.
    """

    def __init__(self, titles, header, tokenizer, history):
        """history: how many of a user's latest titles a prompt shows (> 0)."""
        bad = next((t for t in titles if not t.strip() or "\n" in t), None)
        if bad is not None:
            raise InputError(f"title {bad!r} is empty or has a line break in it")
        self.history = history
        self.tokens = [tokenizer.encode(t + "\n") for t in titles]
        self.lengths = np.array([len(t) for t in self.tokens])
        self.header = list(tokenizer.prefix) + tokenizer.encode(header)
        self.trie = Trie(self.tokens)

    def document(self, items):
        """The one prompt format: header, then a title a line. -> (token ids, place of every title's
        first token).
        """
        ids, starts = list(self.header), []
        for i in items:
            starts.append(len(ids))
            ids += self.tokens[i]
        return ids, starts

    def prompts(self, histories, device="cpu"):
        """Histories (only the last `history` titles are shown) -> tokens (B, P), padded on the
        right, lengths (B,).
        """
        docs = [self.document(h[-self.history:])[0] for h in histories]
        return pad(docs).to(device), torch.tensor([len(d) for d in docs], device=device)

    def branches(self, windows, places, device="cpu", multiple=1):
        """Windows of titles, and places (B, A) in each -> tokens (B, P) of the whole windows,
        lengths (B, A): how many tokens come before the title at each place. Every place is a prompt
        of its own, and they share one row.
        """
        docs, starts = zip(*(self.document(w) for w in windows))
        length = np.stack([np.array(s)[p] for s, p in zip(starts, places)])
        return pad(docs, multiple).to(device), torch.as_tensor(length, device=device)

    def window_batch(self, windows, device="cpu", multiple=1):
        """Windows of titles -> every choice in every title but the first, as prediction targets.

        Returns tokens (B, L); and for the R choices: `at` (R,), the flat index b * L + t of the
        hidden state that predicts it, the trie node it is made at (R,) and the child taken (R,);
        and the number of titles predicted.
        """
        mode, (docs, starts) = self.trie.modes["trie"], zip(*(self.document(w) for w in windows))
        tokens = pad(docs, multiple)
        items = torch.as_tensor(np.concatenate([w[1:] for w in windows]), device=device)
        node, child = mode.step_node[items], mode.step_child[items]                    # (titles, J)
        # predicted from the token before the title, and on by the title's own tokens so far
        at = np.concatenate([b * tokens.shape[1] + np.array(s[1:]) - 1
                             for b, s in enumerate(starts)])
        at = torch.as_tensor(at, device=device)[:, None] + self.trie.depth[node]
        keep = node >= 0
        return tokens.to(device), at[keep], node[keep], child[keep], len(items)


def pad(docs, multiple=1):
    """Lists of ids -> (B, L) int64, zeros on the right; L rounded up so that a compiled model sees
    few shapes.
    """
    out = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(d) for d in docs], batch_first=True)
    return torch.nn.functional.pad(out, (0, -out.shape[1] % multiple))


def training_batches(histories, size, batch_size, tokens, rng):
    """Endless batches of batch_size windows, each of at most `size` titles of one of the training
    histories. In an epoch every title but a user's first is a target once, since a window begins
    with the title the one before ended with. Where the cuts fall is drawn anew.

    tokens (I,): the length of every title. Windows of like length stand in one batch (they are
    sorted within pools of 32 batches), so that little is computed on padding. What does not fill an
    epoch's last batch waits for the next epoch.
    """
    step, waiting = size - 1, []
    while True:
        epoch = waiting
        for h in histories:
            starts = range(-int(rng.integers(step)), len(h) - 1, step)
            epoch += [w for s in starts if len(w := h[max(0, s):s + size]) > 1]
        order = rng.permutation(len(epoch))
        full = len(epoch) // batch_size * batch_size
        waiting = [epoch[k] for k in order[full:]]
        batches = []
        for i in range(0, full, 32 * batch_size):
            pool = sorted(order[i:min(i + 32 * batch_size, full)],
                          key=lambda k: tokens[epoch[k]].sum())
            batches += [pool[j:j + batch_size] for j in range(0, len(pool), batch_size)]
        for b in rng.permutation(len(batches)):
            yield [epoch[k] for k in batches[b]]


def draw_places(windows, n, rng):
    """For each window, n of its titles but the first, drawn without repetition where it is long
    enough -> (B, n).
    """
    return np.stack([1 + rng.choice(len(w) - 1, n, replace=len(w) - 1 < n) for w in windows])
