"""Equation (1): the language model as a distribution q over the catalog; a round of play with it.

    q(y | x) = prod_j  exp(logit_j[y_j]) / sum_{a in children(node_j)} exp(logit_j[a])         (1)

Two ways to compute the same q. `log_q` is one differentiable pass, for training: in each row the
prompt, then every trie node that the row's items need. `Search` is for inference: it runs the
prompts once, keeps their keys and values, and grows the trie under them node by node; scoring,
sampling and the exact top K are three ways to choose what to grow. Both rest on one mask: a trie
node looks at the prompt and at its ancestors, so all continuations share one row and the prompt is
computed once.

over="trie" is (1). over="vocab" is the ordinary softmax over the whole vocabulary along the same
paths; then the catalog's probabilities sum to less than one, and what is missing went to titles
that do not exist. Read `catalog.Trie` and `catalog.Mode` first.

B rows, P prompt tokens, A places at which a document branches off, Q trie nodes in a row, W trie
nodes that they may look at, M items in a row, S samples; N nodes and I items of the trie, C
children, at most J decisions on the way to an item and L tokens from one to the next; R decisions.
"""

import numpy as np
import torch

NEG = float("-inf")


def unique_rows(x):
    """(B, n) -> (B, m): the distinct values >= 0 of each row ascending, -1 padded on the right."""
    x = x.sort(1).values
    x = torch.where(torch.cat([x.new_ones(len(x), 1, dtype=torch.bool), x[:, 1:] != x[:, :-1]], 1)
                    & (x >= 0), x, x.new_tensor(2 ** 62))
    x = x.sort(1).values
    m = int((x < 2 ** 62).sum(1).max()) if x.numel() else 0
    return torch.where(x[:, :m] < 2 ** 62, x[:, :m], -1)


def hang(trie, length, queries, keys, n_prompt):
    """Trie nodes under documents: what the model must be told of them.

    A document may be branched off at A places: length (B,A) says how many of its tokens come before
    each. A node v under branch a is written a * N + v (queries (B,Q), keys (B,W), -1 padded); it
    sees its branch's part of the document and its own ancestors among the keys, and its position
    goes on from where the branch leaves. Returns tokens (B,Q), positions (B,Q) and the mask
    (B,Q,P+W).
    """
    N, real = trie.n_nodes, queries >= 0
    branch, node = queries.clamp(min=0) // N, queries.clamp(min=0) % N
    before = length.gather(1, branch)
    # a query looks at its ancestors and itself: the keys whose [enter, leave) holds its own `enter`
    # (see `catalog.Trie`). Shifted by N a branch (key - key_node) the intervals of different
    # branches are disjoint; those of padding are empty
    enter = torch.where(real, branch * N + trie.enter[node], -1)
    key_node = keys.clamp(min=0) % N
    low = torch.where(keys >= 0, keys - key_node + trie.enter[key_node], 0)
    high = torch.where(keys >= 0, keys - key_node + trie.leave[key_node], 0)
    tree = (low[:, None] <= enter[:, :, None]) & (enter[:, :, None] < high[:, None])
    prompt = torch.arange(n_prompt, device=queries.device) < before[:, :, None]
    return (trie.token[node].where(real, 0), before + trie.depth[node] - 1,
            torch.cat([prompt, tree], 2))


def decide(model, trie, hidden, nodes, over):
    """The output layer at R decisions: hidden (R,width), nodes (R,) -> their children (R,C), in the
    trie's order, -1 padded, and the log-probability of each, float32, -inf padded.

    The softmax runs over the node's children (over="trie"), or over the vocabulary ("vocab").
    """
    logits = model.logits(hidden, trie.vocab if over == "trie" else None)
    children = trie.children(nodes)
    among = logits.gather(1, trie.modes[over].column[children.clamp(min=0)])
    among = among.masked_fill(children < 0, NEG)
    return children, among - (among if over == "trie" else logits).logsumexp(-1, keepdim=True)


def step_log_prob(model, trie, hidden, nodes, child):
    """log-probability of taking `child` (R,) at the decisions `nodes` (R,), given their hidden
    states (R,width) -> (R,).
    """
    _, step = decide(model, trie, hidden, nodes, "trie")
    return step.gather(1, (child - trie.first[nodes])[:, None])[:, 0]


def log_q(model, trie, prompt, items, over="trie"):
    """Exact log q of given items under (1), differentiable, in one pass.

    prompt: documents (B,P) and, for each, A places to branch off, given as lengths (B,A) in tokens:
    the document's first so many tokens are the history of that branch. items (B,A,M) -> (B,A,M).

    A row is the document followed, for every branch, by the distinct trie nodes that its items'
    decisions need (`hang`). Titles that begin alike share those nodes; forced tokens after the last
    decision are never computed. Where a row's decisions stand: columns 0 .. A - 1 are the branches'
    roots, A .. A + Q - 1 the nodes hung on.
    """
    (tokens, length), mode, N = prompt, trie.modes[over], trie.n_nodes
    (B, P), A, device = tokens.shape, length.shape[1], tokens.device
    offset = N * torch.arange(A, device=device)[:, None, None]     # of each branch's nodes (`hang`)
    # the nodes that each row must hold
    at_node, child = mode.step_node[items], mode.step_child[items]                 # (B,A,M,J)
    chain = mode.chain[at_node.clamp(min=0)]                                       # (B,A,M,J,L)
    key = torch.where((chain >= 0) & (at_node >= 0)[..., None], offset[..., None] + chain, -1)
    key = unique_rows(key.flatten(1))                                              # (B,Q)
    # one pass over documents and nodes
    new, at, mask = hang(trie, length, key, key, P)
    place = torch.arange(P, device=device)
    causal = (place[None, :] <= place[:, None]).expand(B, P, P)
    mask = torch.cat([torch.cat([causal, causal.new_zeros(B, P, key.shape[1])], 2), mask], 1)
    hidden = model(torch.cat([tokens, new], 1), torch.cat([place.expand(B, P), at], 1), mask)
    # the decisions: each branch's root, seen from the last token before it, and those among nodes
    roots = hidden.gather(1, (length - 1)[:, :, None].expand(-1, -1, hidden.shape[-1]))
    hidden = torch.cat([roots, hidden[:, P:]], 1)                                  # (B,A+Q,width)
    node = torch.cat([key.new_zeros(B, A), torch.where(key >= 0, key % N, -1)], 1)
    chosen = (node >= 0) & mode.decision[node]
    _, step = decide(model, trie, hidden[chosen], node[chosen], over)              # (R,C)
    # every item's own steps among them: the step at node v of branch a stands in column a if v is
    # the root, else in A + v's place in `key`. Where there is no step, junk, masked at the end
    index = chosen.flatten().cumsum(0).view(B, -1) - 1      # (B,A+Q): a column -> its line of step
    found = torch.searchsorted(key.where(key >= 0, 2 ** 62),
                               (offset + at_node).clamp(min=0).flatten(1)).view(at_node.shape)
    where = torch.where(at_node == 0, offset // N, A + found).clamp(max=index.shape[1] - 1)
    row = index.gather(1, where.flatten(1)).view(at_node.shape)
    taken = step[row, (child - trie.first[at_node]).clamp(min=0)]                  # (B,A,M,J)
    return taken.masked_fill(at_node < 0, 0.0).sum(-1)


class Search:
    """The trie under a batch of prompts, grown on demand. logp (B,N+1): log-probability of every
    prefix known so far (the last column is a bin).

    logp[b, v] is known (finite) once the decision above node v has been expanded: for the next
    decisions and for finished titles, never for the forced nodes between. Expanding a decision runs
    the tokens from the one above it, once, whatever is asked later. As in `log_q`, a document may
    be branched off at several places: with lengths (D,A) there are B = D * A rows, one a branch,
    and a document is read once and cached once for all of them. `top_k` lets documents go that are
    done: d of them and their b branches are still in the cache.
    """

    def __init__(self, model, trie, prompt, over="trie"):
        self.model, self.trie, self.over, self.mode = model, trie, over, trie.modes[over]
        (tokens, length), self.cache = prompt, []           # (D,P), and (D,) or (D,A)
        D, device = len(tokens), tokens.device
        self.length, self.n_prompt = length.view(D, -1), tokens.shape[1]
        hidden = model(tokens, cache=self.cache)
        self.cached = tokens.new_empty(D, 0)                # (d,W) trie nodes after the prompt
        self.docs = torch.arange(D, device=device)          # (d,) documents still in the cache
        self.rows = torch.arange(length.numel(), device=device)        # (b,) and their branches
        self.offset = self.rows % self.length.shape[1] * trie.n_nodes  # of a branch's nodes
        self.logp = torch.full((len(self.rows), trie.n_nodes + 1), NEG, device=device)
        self.logp[:, 0] = 0.0
        self.expanded = torch.zeros_like(self.logp, dtype=torch.bool)
        last = (self.length - 1)[:, :, None].expand(-1, -1, hidden.shape[-1])
        self._settle(self.rows, torch.zeros_like(self.rows), hidden.gather(1, last).flatten(0, 1))

    def _settle(self, rows, nodes, hidden, levels=1):
        """Given the hidden states (R,width) at decisions `nodes` (R,) of `rows` (R,), write down
        what their children lead to. levels: how many of the decisions may stand one above the
        other. The children of a decision are known once it is known itself: with the root done and
        a decision and one below it in `nodes`, the first pass makes the upper one's children known,
        the second the lower one's.
        """
        child, step = decide(self.model, self.trie, hidden, nodes, self.over)      # (R,C)
        to = torch.where(child >= 0, self.mode.end[child], self.trie.n_nodes)
        for _ in range(levels):
            self.logp[rows[:, None], to] = self.logp[rows, nodes][:, None] + step
        self.logp[:, -1] = NEG
        self.expanded[rows, nodes] = True

    def expand(self, nodes, levels=1):
        """Run the decisions nodes (b, Q), -1 padded, one row for every row still in the cache; a
        decision above them was expanded before, or is among them (levels > 1).
        """
        chain = self.mode.chain[nodes.clamp(min=0)]                                # (b,Q,L)
        # rows stand document by document, so the first ones have the right branches
        key = torch.where((chain >= 0) & (nodes >= 0)[:, :, None],
                          chain + self.offset[:len(nodes), None, None], -1)
        key = unique_rows(key.view(len(self.docs), -1))                            # (d,Q)
        self.cached = torch.cat([self.cached, key], 1)
        hidden = self.model(*hang(self.trie, self.length[self.docs], key, self.cached,
                                  self.n_prompt), self.cache)
        N, A = self.trie.n_nodes, self.length.shape[1]
        d, w = ((key >= 0) & self.mode.decision[key % N]).nonzero(as_tuple=True)
        self._settle(self.docs[d] * A + key[d, w] // N, key[d, w] % N, hidden[d, w], levels)

    def expand_all(self, nodes):
        """Run what has not been run of the decisions nodes (b, Q), -1 padded, wherever they are."""
        nodes = torch.where((nodes >= 0) & ~self.expanded[self.rows[:, None], nodes], nodes, -1)
        if (nodes >= 0).any():
            self.expand(nodes, self.mode.step_node.shape[1])

    def keep(self, which):
        """Drop the documents that are finished from the cache: which (d,) bool over those still
        there.
        """
        self.docs, self.cached = self.docs[which], self.cached[which]
        self.rows = (self.docs[:, None] * self.length.shape[1]
                     + torch.arange(self.length.shape[1], device=which.device)).flatten()
        for kv in self.cache:
            kv.keep(which)

    def score(self, items):
        """log q of items (B,M) -> (B,M), in one pass over what they need and nothing has run.
        ValueError after `top_k`, which has forgotten rows that this needs.
        """
        if len(self.rows) != len(items):
            raise ValueError("score after top_k: give the scores their own Search")
        self.expand_all(self.mode.step_node[items].flatten(1))
        return self.logp.gather(1, self.trie.leaf[items])

    def sample(self, n, tau=1.0, generator=None):
        """S = n independent items a row -> (B,S), drawn token by token from the trie.

        tau flattens (> 1) or sharpens (< 1) every decision: softmax(logits / tau) over the children
        of the node, so what is renormalised is each token step, not q^(1/tau) over whole items
        (which would take the whole catalog to compute). At tau = 1 the two are the same and a
        sample is an exact draw from q (with over="vocab": from q given that the title exists).
        """
        node = torch.zeros(len(self.rows), n, dtype=torch.long, device=self.logp.device)
        while True:
            active = self.trie.item[node] < 0
            if not active.any():
                return self.trie.item[node]
            todo = torch.where(active & ~self.expanded.gather(1, node), node, -1)
            if (todo >= 0).any():
                self.expand(todo)
            b, s = active.nonzero(as_tuple=True)
            children = self.trie.children(node[b, s])                              # (R,C)
            end = torch.where(children >= 0, self.mode.end[children], self.trie.n_nodes)
            z = self.logp[b[:, None], end] / tau        # log-prob of node itself cancels
            pick = torch.multinomial(z.softmax(-1), 1, generator=generator)
            node[b, s] = end.gather(1, pick)[:, 0]

    def top_k(self, k, seen, width=8):
        """The k most probable items of each row, `seen` (B,I) bool left out -> items (B,k), log q
        (B,k), prefixes run (B,).

        Exact: a prefix is at least as probable as every title under it, so it is expanded, best
        first, up to `width` at a time (a width that grows by half with every pass up to 64, as a
        poor model needs many, but not over the vocabulary, whose rows of logits are long), only
        while it still beats the k-th best finished title. width = 0 runs the whole catalog in one
        pass instead: more tokens, no waiting for one pass to say what the next one needs. Where
        fewer than k items are left unseen, the rest is -1 with -inf. k <= I. The last thing to ask
        of a Search: finished documents leave its cache.
        """
        decisions = self.mode.decision.nonzero()[:, 0]
        if not width:
            self.expand_all(decisions.expand(len(self.rows), -1))
        while width:
            titles = self.logp[self.rows[:, None], self.trie.leaf].masked_fill(seen[self.rows], NEG)
            kth = titles.topk(k, 1).values[:, -1:]                      # the list's last so far
            done = self.expanded[self.rows[:, None], decisions]
            open_ = self.logp[self.rows[:, None], decisions].masked_fill(done, NEG)
            # no title under a prefix is more probable than it
            bound, which = open_.topk(min(int(width), len(decisions)), 1)
            width = min(1.5 * width, 64) if self.over == "trie" else width
            want = bound > kth                                          # may still enter the list
            busy = want.view(len(self.docs), -1).any(1)                 # (d,)
            if not busy.any():
                break
            if busy.float().mean() < 0.75:          # forget those that are finished, now and then
                self.keep(busy)
                branches = busy.repeat_interleave(self.length.shape[1])
                want, which = want[branches], which[branches]
            want = want[:, :int(want.sum(1).max())]
            self.expand(torch.where(want, decisions[which[:, :want.shape[1]]], -1))
        titles = self.logp[:, self.trie.leaf].masked_fill(seen, NEG)
        value, item = titles.topk(k, 1)
        return torch.where(value > NEG, item, -1), value, self.expanded.sum(1)


@torch.no_grad()
def play(policies, catalog, windows, places, n, tau, batch_size, alpha=1.0, progress=iter,
         generator=None, negatives="sampled"):
    """A round of self-play: at every place in every window the opponent makes up n items, and all
    that the loss needs is scored.

    policies(name) -> model with that adapter switched on ("player" is the opponent q_t as the round
    begins, "sft" the frozen one). windows: R arrays of items; places (R,A): which of a window's
    titles are to be told from made-up ones (> 0, so that there is a history). progress wraps the
    loop (tqdm). negatives: "sampled" from the opponent; or its "top" n (SPRec), or "uniform" over
    the catalog (DPO), to compare with. Returns items (R,A,1+n), the true one first, and log q_t and
    log q_sft of all of them, (R,A,1+n) each; with alpha = 1, log q_sft is not needed and log q_t
    stands in its place.
    """
    out, trie = [], catalog.trie
    for i in progress(range(0, len(windows), batch_size)):
        w, p = windows[i:i + batch_size], places[i:i + batch_size]
        prompt = catalog.branches(w, p, trie.token.device)
        true = torch.as_tensor(np.stack([x[y] for x, y in zip(w, p)]),
                               device=trie.token.device).view(-1, 1)
        search = Search(policies("player"), trie, prompt)
        if negatives == "sampled":
            made_up = search.sample(n, tau, generator)
        elif negatives == "top":
            nothing_seen = true.new_zeros(len(true), len(trie.leaf), dtype=torch.bool)
            # in a Search of its own: top_k forgets rows that the scores below need
            made_up = Search(search.model, trie, prompt).top_k(n, nothing_seen)[0]
        else:
            made_up = torch.randint(len(trie.leaf), (len(true), n), generator=generator,
                                    device=true.device)
        items = torch.cat([true, made_up], 1)
        logq_t = search.score(items)
        logq_sft = logq_t if alpha == 1 else Search(policies("sft"), trie, prompt).score(items)
        out.append([x.view(len(w), -1, 1 + n) for x in (items, logq_t, logq_sft)])
    return tuple(torch.cat(x) for x in zip(*out))
