"""A repository of the Hugging Face Hub as the place of an export: made on this machine, sent by the Hub's own client.

The Hub takes a commit whole or not at all, and knows a file by its SHA-256 before it is sent, so the files lie on this
machine until they are there, below `$XDG_CACHE_HOME/ckptc/uploads`, and no longer. An upload that breaks goes on with the
same command: what the Hub has already is not sent again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ckptc.diagnostics import fail
from ckptc.storage.source.hub_client import Client, HubName, library, page, parse_name, refusals, token
from ckptc.storage.source.remembered import cache_home

CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def target(name: str) -> HubName:
    """The repository that `hf://ORG/NAME` names. Raises `hub-name`."""
    found = parse_name(name)
    if found is None or found.revision is not None:
        help = "write it hf://ORG/NAME; a new commit of its main branch is made"
        raise fail("hub-name", f"`{name}` is not the name of a repository to write to", help=help)
    return found


def prepare(name: HubName, public: bool, force: bool) -> None:
    """Makes the repository if there is none, private unless `public`: what cannot be written to is known before any work.

    Raises InputError: `hub-no-token`, `output-exists` where it holds weights and is not to be replaced, and what
    `refusals` says.
    """
    if token() is None:
        raise fail(
            "hub-no-token", f"writing {name} takes a token of the Hub", help="log in with `hf auth login` or set HF_TOKEN"
        )  # fmt: skip
    with refusals(name):
        library().HfApi().create_repo(name.repo, private=not public, exist_ok=True)
    held = sorted(f for f in Client().commit(name).files if f.endswith(WEIGHTS))
    if held and not force:
        raise fail(
            "output-exists", f"{name} holds weights already", notes=(f"found: {held[0]} at {page(name)}",),
            help="choose another name, or use --force: they stay in its history",
        )  # fmt: skip


def staging(digest: str) -> Path:
    """Where the files of this plan lie until they are sent. Raises `no-cache`."""
    home = cache_home()
    if home is None:
        raise fail("no-cache", "there is no place for files on their way to the Hub", help="set XDG_CACHE_HOME or HOME")
    place = home / "uploads" / digest.partition(":")[2]
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def send(directory: Path, name: HubName, card: str, message: str) -> str:
    """All files of a directory and a card as one commit, in which no older weights are left; the directory is removed.
    Returns the commit's address. Raises what `refusals` says.
    """
    api = library().HfApi()
    with refusals(name):
        held = Client().commit(name).files
        if CARD not in held:  # one that people have written stays
            (directory / CARD).write_text(card, encoding="utf-8")
        made = {p.name for p in directory.iterdir()}
        stale = [f for f in held if f not in made and (f.endswith(WEIGHTS) or f.endswith(".index.json"))]
        add, delete = library().CommitOperationAdd, library().CommitOperationDelete
        operations = [*(add(p.name, str(p)) for p in sorted(directory.iterdir()) if p.is_file()), *map(delete, stale)]
        done = api.create_commit(name.repo, operations, commit_message=message)
    shutil.rmtree(directory)
    return str(done.commit_url)


def card(model: str, repo: str, family: str, digest: str, source: str, exact: str, notes: Sequence[str]) -> str:
    """The model card: what the weights come from, and how near to it they are."""
    lines = ["---", f"base_model: {repo}", "library_name: transformers", "tags:", "- ckptc", "- safetensors", "---", ""]
    lines += [f"# {model}", "", f"Weights of a {family} model, exported to safetensors by ckptc.", ""]
    lines += [f"- Source: {source}", f"- Architecture and names of tensors: [{repo}](https://huggingface.co/{repo})"]
    lines += [
        f"- Exactness: {exact}",
        f"- Plan: `{digest}`",
        *(f"- Note: {n}" for n in notes if not n.startswith("reads ")),
        "",
    ]
    return "\n".join(lines)
