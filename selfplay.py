"""Equation (1): the language model as a distribution q over the catalog, and a round of play with
it.

    q(y | x) = prod_j  exp(logit_j[y_j]) / sum_{a in children(node_j)} exp(logit_j[a])
    (1)

Two ways to compute the same q. `log_q` is one differentiable pass, for training: in each row the
prompt, then every trie node that the row's items need. `Search` is for inference: it runs the
prompts once, keeps their keys and values, and grows the trie under them node by node; scoring,
sampling and the exact top K are three ways to choose what to grow. Both rest on one mask: a trie
node looks at the prompt and at its ancestors, so all continuations share one row and the prompt is
computed once.

over="trie" is (1). over="vocab" is the ordinary softmax over the whole vocabulary along the same
paths; then the catalog's probabilities sum to less than one, and what is missing went to titles
that do not exist.

B rows, P prompt tokens, Q trie nodes in a row, M items in a row, S samples, N nodes and I items of
the trie, C children.
"""

import numpy as np
import torch

NEG = float("-inf")


def look(trie, queries, keys):
    """The tree mask: queries (B,Q), keys (B,S) trie nodes, -1 padded -> (B,Q,S) True where a key is
    the query's ancestor or itself.
    """
    q, k = queries[:, :, None], keys[:, None, :]
    return (trie.enter[k] <= trie.enter[q]) & (trie.enter[q] < trie.leave[k]) & (q >= 0) & (k >= 0)


def unique_rows(x):
    """(B, n) -> (B, m): the distinct values >= 0 of each row ascending, -1 padded on the right."""
    x = x.sort(1).values
    x = torch.where(torch.cat([x.new_ones(len(x), 1, dtype=torch.bool), x[:, 1:] != x[:, :-1]], 1)
                    & (x >= 0), x, x.new_tensor(2 ** 62))
    x = x.sort(1).values
    m = int((x < 2 ** 62).sum(1).max()) if x.numel() else 0
    return torch.where(x[:, :m] < 2 ** 62, x[:, :m], -1)


def decide(model, trie, hidden, nodes, over):
    """The output layer at R decisions: hidden (R,D), nodes (R,) -> logits (R,·) and their log
    normaliser (R,), float32.

    The logits are of the catalog's tokens (over="trie") or of all (over="vocab"); `Mode.column`
    says where a node's is. The normaliser runs over the node's children, or over the vocabulary.
    """
    if over == "vocab":
        logits = model.logits(hidden)
        return logits, logits.logsumexp(-1)
    logits = model.logits(hidden, trie.vocab)
    children = trie.children(nodes)
    among = logits.gather(1, trie.modes[over].column[children.clamp(min=0)])
    return logits, among.masked_fill(children < 0, NEG).logsumexp(-1)


def step_log_prob(model, trie, hidden, nodes, child, over="trie"):
    """log-probability of taking `child` (R,) at the decisions `nodes` (R,), given their hidden
    states (R,D) -> (R,).
    """
    logits, norm = decide(model, trie, hidden, nodes, over)
    return logits.gather(1, trie.modes[over].column[child][:, None])[:, 0] - norm


def log_q(model, trie, prompt, items, over="trie"):
    """Exact log q of given items under (1), differentiable, in one pass.

    prompt: documents (B,P) and, for each, A places to branch off, given as lengths (B,A) in tokens:
    the document's first so many tokens are the history of that branch. items (B,A,M) -> (B,A,M).

    A row is the document followed, for every branch, by the distinct trie nodes at or above the
    last decision of each of its items. Titles that begin alike share those nodes; forced tokens
    after the last decision are never computed; a node sees its branch's part of the document and
    its own ancestors, and its position goes on from where the branch leaves.
    """
    (tokens, length), mode, N = prompt, trie.modes[over], trie.n_nodes
    (B, P), A, device = tokens.shape, length.shape[1], tokens.device
    branch = torch.arange(A, device=device)[:, None, None]
    path = trie.path[items]                                                        # (B,A,M,D)
    # breadth first: deeper is larger
    last = mode.step_node[items].amax(-1, keepdim=True)
    key = torch.where((path >= 0) & (path <= last), branch * N + path, -1)
    # (B,Q) a (branch, node) each
    key = unique_rows(key.flatten(1))
    real, of, nodes = key >= 0, key.clamp(min=0) // N, torch.where(key >= 0, key % N, -1)
    # (B,Q) tokens of the document a node sees
    seen = length.gather(1, of)
    place = torch.arange(P, device=device)
    row = torch.cat([tokens, trie.token[nodes].where(real, 0)], 1)
    at = torch.cat([place.expand(B, P), seen + trie.depth[nodes] - 1], 1)
    causal = (place[None, :] <= place[:, None]).expand(B, P, P)
    tree = look(trie, nodes, nodes) & (of[:, :, None] == of[:, None, :])
    mask = torch.cat([torch.cat([causal, causal.new_zeros(B, P, key.shape[1])], 2),
                      torch.cat([place < seen[:, :, None], tree], 2)], 1)
    hidden = model(row, at, mask)
    # the decisions: each branch's root, seen from the last token before it, and those among the
    # nodes
    roots = hidden.gather(1, (length - 1)[:, :, None].expand(-1, -1, hidden.shape[-1]))
    hidden = torch.cat([roots, hidden[:, P:]], 1)                                  # (B,A+Q,D)
    nodes = torch.cat([nodes.new_zeros(B, A), nodes], 1)
    chosen = (nodes >= 0) & mode.decision[nodes]
    logits, norm = decide(model, trie, hidden[chosen], nodes[chosen], over)
    # (b, place in the row) -> row of logits
    index = chosen.flatten().cumsum(0).view(B, -1) - 1
    u, child = mode.step_node[items], mode.step_child[items]                       # (B,A,M,J)
    found = torch.searchsorted(key.where(real, 2 ** 62),
                               (branch * N + u).clamp(min=0).flatten(1)).view(u.shape)
    where = torch.where(u == 0, branch, A + found)
    r = index.gather(1, where.clamp(max=index.shape[1] - 1).flatten(1)).view(u.shape)
    step = logits[r, mode.column[child]] - norm[r]
    return step.masked_fill(u < 0, 0.0).sum(-1)


class Search:
    """The trie under a batch of prompts, grown on demand. logp (B,N): log-probability of every
    prefix known so far.

    logp[b, v] is known (finite) once the decision above node v has been expanded: for the next
    decisions and for finished titles, never for the forced nodes between. Expanding a decision runs
    the tokens from the one above it, once. As in `log_q`, a document may be branched off at several
    places: with lengths (D,A) there are B = D * A rows, one a branch.
    """

    def __init__(self, model, trie, prompt, over="trie"):
        self.model, self.trie, self.over, self.mode = model, trie, over, trie.modes[over]
        tokens, length = prompt                             # (D,P), and (D,) or (D,A)
        self.cache, self.n_prompt, self.length = [], tokens.shape[1], length.flatten()
        hidden = model(tokens, cache=self.cache)
        B, A = len(self.length), len(self.length) // len(tokens)
        if A > 1:                                           # branches of a document share its pass
            hidden = hidden.repeat_interleave(A, 0)
            self.cache = [(k.repeat_interleave(A, 0), v.repeat_interleave(A, 0))
                          for k, v in self.cache]
        self.cached = tokens.new_empty(B, 0)                # trie nodes cached after the prompt
        self.rows = torch.arange(B, device=tokens.device)   # rows still in the cache
        self.logp = torch.full((B, trie.n_nodes), NEG, device=tokens.device)
        self.logp[:, 0] = 0.0
        self.expanded = torch.zeros(B, trie.n_nodes, dtype=torch.bool, device=tokens.device)
        self._settle(self.rows, torch.zeros_like(self.rows), hidden[self.rows, self.length - 1])

    def _settle(self, rows, nodes, hidden):
        """Given the hidden states (R,D) at decisions `nodes` (R,) of `rows` (R,), write down what
        their children lead to.
        """
        logits, norm = decide(self.model, self.trie, hidden, nodes, self.over)
        children = self.trie.children(nodes)                                       # (R,C)
        r, c = (children >= 0).nonzero(as_tuple=True)
        child = children[r, c]
        step = logits[r, self.mode.column[child]] - norm[r]
        self.logp[rows[r], self.mode.end[child]] = self.logp[rows[r], nodes[r]] + step
        self.expanded[rows, nodes] = True

    def expand(self, nodes):
        """Run the decisions nodes (b, Q), -1 padded, one row for every row still in the cache; the
        decisions above them must have been expanded before.
        """
        chain = [nodes]                                     # a decision, the forced nodes above it
        above = self.mode.up[nodes]
        while True:
            up = self.trie.parent[chain[-1]]
            up = torch.where((chain[-1] >= 0) & (up != above), up, -1)
            if not (up >= 0).any():
                break
            chain.append(up)
        new = torch.stack(chain[::-1], 2)                   # (b, Q, L), the decision last
        (b, Q, L), new = new.shape, new.flatten(1)
        keys, length = torch.cat([self.cached, new], 1), self.length[self.rows]
        prompt = torch.arange(self.n_prompt, device=new.device) < length[:, None]
        mask = torch.cat([prompt[:, None].expand(b, Q * L, -1), look(self.trie, new, keys)], 2)
        tokens = self.trie.token[new].where(new >= 0, 0)
        at = length[:, None] + self.trie.depth[new] - 1
        hidden = self.model(tokens, at, mask, self.cache)
        self.cached = keys
        r, q = (nodes >= 0).nonzero(as_tuple=True)
        self._settle(self.rows[r], nodes[r, q], hidden.view(b, Q, L, -1)[r, q, -1])

    def keep(self, which):
        """Drop the rows that are finished from the cache: which (b,) bool over the rows still
        there.
        """
        self.rows, self.cached = self.rows[which], self.cached[which]
        self.cache = [(k[which], v[which]) for k, v in self.cache]

    def score(self, items):
        """log q of items (B,M) -> (B,M). Grows what they need, level by level."""
        for u in self.mode.step_node[items].unbind(-1):     # (B,M) the j-th decision of each
            u = torch.where((u >= 0) & ~self.expanded.gather(1, u.clamp(min=0)), u, -1)
            if (u >= 0).any():
                self.expand(unique_rows(u))
        return self.logp.gather(1, self.trie.leaf[items])

    def sample(self, n, tau=1.0, generator=None):
        """S = n independent items a row -> (B,S), drawn token by token from the trie.

        tau flattens (> 1) or sharpens (< 1) every decision: softmax(logits / tau) over the children
        of the node, so what is renormalised is each token step, not q^(1/tau) over whole items
        (which would take the whole catalog to compute). At tau = 1 the two are the same and a
        sample is an exact draw from q (with over="vocab": from q given that the title exists).
        """
        B, device = len(self.rows), self.logp.device
        node = torch.zeros(B, n, dtype=torch.long, device=device)
        while True:
            active = self.trie.item[node] < 0
            if not active.any():
                return self.trie.item[node]
            todo = torch.where(active & ~self.expanded.gather(1, node), node, -1)
            if (todo >= 0).any():
                self.expand(unique_rows(todo))
            b, s = active.nonzero(as_tuple=True)
            children = self.trie.children(node[b, s])                              # (R,C)
            end = self.mode.end[children.clamp(min=0)]
            # the constant log-prob of node cancels
            z = self.logp[b[:, None], end].masked_fill(children < 0, NEG) / tau
            pick = torch.multinomial(z.softmax(-1), 1, generator=generator)
            node[b, s] = end.gather(1, pick)[:, 0]

    def top_k(self, k, seen, width=8):
        """The k most probable items of each row, `seen` (B,I) bool left out -> items (B,k), log q
        (B,k), prefixes run (B,).

        Exact: a prefix is at least as probable as every title under it, so it is expanded, best
        first, up to `width` at a time (half as many again each time, for a model that knows
        little), only while it still beats the k-th best finished title. Where fewer than k items
        are left, the rest is -1 with -inf.
        """
        decisions = self.mode.decision.nonzero()[:, 0]
        while True:
            titles = self.logp[self.rows[:, None], self.trie.leaf].masked_fill(seen[self.rows], NEG)
            kth = titles.topk(min(k, titles.shape[1]), 1).values[:, -1:]
            done = self.expanded[self.rows[:, None], decisions]
            open_ = self.logp[self.rows[:, None], decisions].masked_fill(done, NEG)
            bound, which = open_.topk(min(int(width), len(decisions)), 1)
            width *= 1.5
            want = bound > kth
            busy = want.any(1)
            if not busy.any():
                break
            # the others are finished: forget their cache
            if busy.float().mean() < 0.75:
                self.keep(busy)
                want, which = want[busy], which[busy]
            want = want[:, :int(want.sum(1).max())]
            self.expand(torch.where(want, decisions[which[:, :want.shape[1]]], -1))
        titles = self.logp[:, self.trie.leaf].masked_fill(seen, NEG)
        value, item = titles.topk(min(k, titles.shape[1]), 1)
        item = torch.where(value > NEG, item, -1)
        short = k - item.shape[1]
        return (torch.nn.functional.pad(item, (0, short), value=-1), torch.nn.functional.pad(value,
            (0, short), value=NEG),
                self.expanded.sum(1))


@torch.no_grad()
def play(policies, catalog, windows, places, n, tau, batch_size, alpha=1.0, progress=iter,
         generator=None):
    """A round of self-play: at every place in every window the opponent makes up n items, and all
    that the loss needs is scored.

    policies(name) -> model with that adapter switched on ("player" is the opponent q_t as the round
    begins, "sft" the frozen one). windows: R arrays of items; places (R,A): which of a window's
    titles are to be told from made-up ones (> 0, so that there is a history). progress wraps the
    loop (tqdm). Returns items (R,A,1+n), the true one first, and log q_t and log q_sft of all of
    them, (R,A,1+n) each; with alpha = 1, log q_sft is not needed and log q_t stands in its place.
    """
    out, trie = [], catalog.trie
    for i in progress(range(0, len(windows), batch_size)):
        w, p = windows[i:i + batch_size], places[i:i + batch_size]
        prompt = catalog.branches(w, p, trie.token.device)
        true = torch.as_tensor(np.stack([x[y] for x, y in zip(w, p)]),
                               device=trie.token.device).view(-1, 1)
        search = Search(policies("player"), trie, prompt)
        items = torch.cat([true, search.sample(n, tau, generator)], 1)
        logq_t = search.score(items)
        logq_sft = logq_t if alpha == 1 else Search(policies("sft"), trie, prompt).score(items)
        out.append([x.view(len(w), -1, 1 + n) for x in (items, logq_t, logq_sft)])
    return tuple(torch.cat(x) for x in zip(*out))
