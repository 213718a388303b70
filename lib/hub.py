"""The Hub: the files of a data set, each fetched whole, and for every command what went wrong.

    files, options = find_files("org/name", "default", "train", commit)
    for path in fetched(files, folder): ...           # on this disk while it is used
    raise explain(error, "--push_to_hub", "org/name")

A file is named by its address, hf://datasets/ORG/NAME@COMMIT/path.
"""

import contextlib
import csv
import functools
import hashlib
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from lib.cli import UserError, one_line_error
from lib.documents import READERS, check_types, file_type
from lib.files import sha256

# settings of a data set's README that leave its texts as they are
HARMLESS = (
    "name version data_dir data_files description features columns usecols chunksize batch_size"
).split()
PAUSES = (10, 60, 300)  # seconds before each new attempt to fetch a file


# ---- what went wrong ----


def explain(error: Exception, flag: str, repository: str) -> UserError:
    """What went wrong with the Hub, and what to do. Never shows the token.

    flag, repository: what the user gave, as in --dataset org/name.
    """
    from huggingface_hub import constants, errors

    given = f"{flag} {repository}"
    status = status_of(error)
    text = f"{type(error).__name__}: {error}"  # datasets keeps of some errors no more than that
    reason = re.sub(r"hf_\w+", "hf_...", one_line_error(error))
    if isinstance(error, errors.LocalTokenNotFoundError):
        return UserError("you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    if "OfflineModeIsEnabled" in text:
        return UserError(
            "the Hub is switched off on this machine: unset HF_HUB_OFFLINE and run the same "
            "command again"
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{given}: not a repository name; it looks like YOUR_NAME/GPT124M")
    if "GatedRepoError" in text or "is a gated dataset" in text:
        page = f"{constants.ENDPOINT}/datasets/{repository}"
        return UserError(
            f"{given} is gated: log in with `hf auth login` and accept its terms at {page}"
        )
    if isinstance(error, OSError) and error.errno:
        return UserError(
            f"{constants.HF_HOME}, where the Hub's library keeps its files, can't be used:"
            f" {error.strerror}\nHINT: set HF_HOME to a directory that can be written and locked"
        )
    # datasets' own errors for what doesn't exist are FileNotFoundErrors without a number
    if isinstance(error, errors.RepositoryNotFoundError | FileNotFoundError) or status == 404:
        return UserError(
            f"{given} can't be found on the Hub: {reason}\nHINT: check the name, or give local"
            " files"
        )
    if status == 401:
        return UserError("the Hub does not accept your token: run `hf auth login` with a new one")
    if status == 403:
        return UserError(
            f"your token may not write to {repository}: run `hf auth login` with a token of type "
            "write"
        )
    return UserError(
        f"the Hub can't be reached, or refused {given}: {reason}\nHINT: check the network",
        code=1 if status else 2,
    )


def status_of(error) -> int | None:
    """The status of the HTTP answer that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


# ---- finding the files of a data set ----


@contextlib.contextmanager
def explained(dataset: str):
    """Turn what is raised while a data set is looked up into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise explain(error, "--dataset", dataset) from None


def find_commit(dataset: str, revision: str | None = None) -> str:
    """The commit that a data set is at. Raises UserError."""
    from huggingface_hub import HfApi

    with explained(dataset):
        return HfApi().dataset_info(dataset, revision=revision).sha


def find_files(
    dataset: str, name: str | None, split: str, revision: str
) -> tuple[list[str], dict[str, str | int]]:
    """(files, options): the files of a configuration and a split of a data set, and how its README
    has them read. Raises UserError if there is no such thing, and says what there is."""
    with explained(dataset):
        import datasets

        try:
            builder = datasets.load_dataset_builder(dataset, name, revision=revision)
        except ValueError:
            names = datasets.get_dataset_config_names(dataset, revision=revision)
            if name in names or (name is None and len(names) < 2):
                raise
            have = f"has no configuration {name}" if name else "has several configurations"
            raise UserError(
                f"--dataset {dataset} {have}; choose one with --name: {', '.join(names)}"
            ) from None
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            raise UserError(explain_script(dataset, revision)) from None
    by_split = builder.config.data_files or {}
    if split not in by_split:
        splits = ", ".join(map(str, by_split)) or "no files that a split is made of"
        raise UserError(f"--split {split}: {dataset} has no such split; it has {splits}")
    files = [str(file) for file in by_split[split]]
    check_types(dataset, files, pattern="*")
    return files, reading_options(dataset, builder.config)


def reading_options(dataset: str, config) -> dict[str, str | int]:
    """The options of file_documents that a data set's README asks for. Raises UserError naming a
    setting that is not followed here and may change the texts.

    config: the configuration that datasets makes of the README.
    """
    usual = vars(type(config)())
    settings = {key: value for key, value in vars(config).items() if value != usual[key]}
    for key in HARMLESS:
        settings.pop(key, None)
    if str(settings.get("encoding")).lower() in ("utf-8", "utf8"):
        del settings["encoding"]
    options = {}
    if len(str(settings.get("sep"))) == 1:
        options["delimiter"] = settings.pop("sep")
        settings.pop("delimiter", None)  # its other name
    if settings.get("quoting") == csv.QUOTE_NONE:
        options["quoting"] = settings.pop("quoting")
    if settings:
        listed = ", ".join(f"{key}: {value}" for key, value in settings.items())
        raise UserError(
            f"--dataset {dataset}: its README has its files read with {listed}, which is not done"
            f" here\nHINT: `hf download {dataset} --repo-type dataset --local-dir FOLDER`, and give"
            " files with a plain column of texts as --dataset"
        )
    return options


def explain_script(dataset: str, revision: str) -> str:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(dataset, repo_type="dataset", revision=revision)
    readable = [file for file in files if file_type(file) in READERS and file != "README.md"]
    shown = ", ".join((readable or files)[:10]) + (" ..." if len(readable or files) > 10 else "")
    return (
        f"--dataset {dataset} is made by a loading script, a program, which is not run. Its files:"
        f" {shown}\nHINT: `hf download {dataset} --repo-type dataset --local-dir FOLDER` and give"
        " those with the texts as --dataset"
    )


# ---- fetching them ----


def fetched(files: list[str], folder: Path, ahead: bool = True):
    """Yield the path of each of the files, fetched whole into the folder. It is deleted when the
    next one is asked for; ahead: that one is fetched meanwhile.

    What an earlier process left of the first two is used. Raises UserError.
    """
    folder.mkdir(exist_ok=True)
    wanted = [local_path(file, folder) for file in files[:2]]
    for path in folder.iterdir():
        if path not in wanted:
            path.unlink()
    paths = (fetch(file, folder) for file in files)
    for path in one_ahead(paths) if ahead else paths:
        yield path
        path.unlink()


def one_ahead(items):
    """Yield the items, each computed in a thread while the one before it is used."""
    results = queue.SimpleQueue()
    taken = threading.Semaphore(0)

    def work():
        try:
            for item in items:
                results.put((item, None))
                taken.acquire()
        except BaseException as error:
            results.put((None, error))
        results.put((None, StopIteration()))

    # a daemon, so that Ctrl-C does not wait for it
    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = results.get()
        taken.release()
        if isinstance(error, StopIteration):
            return
        if error:
            raise error
        yield item


def local_path(file: str, folder: Path) -> Path:
    """Where a file of the Hub is kept: its commit is in the address, so the name is of one content.
    The last part has the type."""
    digest = hashlib.sha256(file.encode()).hexdigest()[:16]
    return folder / f"{digest}-{os.path.basename(file)}"


def fetch(file: str, folder: Path) -> Path:
    """A file of the Hub, on this disk. After a network fault it is tried again, from the bytes that
    are there. Raises UserError."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    dataset = file.removeprefix("hf://datasets/").partition("@")[0]
    failures = 0
    while True:
        try:
            return fetch_once(file, local_path(file, folder))
        except Exception as error:
            status = status_of(error) or 0
            refused = 400 <= status < 500 and status not in (408, 429)
            if isinstance(error, OSError) and error.errno:  # of this disk
                raise
            if refused or isinstance(error, OfflineModeIsEnabled):
                raise explain(error, "--dataset", dataset) from None
            if failures == len(PAUSES):
                raise UserError(
                    f"{file} can't be fetched from the Hub: {one_line_error(error)}\nHINT: check"
                    " the network and run the same command again; what is written stays and is not"
                    " fetched again",
                    code=1,
                ) from None
            pause = PAUSES[failures]
            failures += 1
            tqdm.write(f"network: {one_line_error(error)}; next try in {pause} s", file=sys.stderr)
            time.sleep(pause)


def fetch_once(file: str, path: Path) -> Path:
    """Append to `path` what it lacks of a file of the Hub, and check it: its size, and its sha256
    where the Hub has one, as of all large files.

    hf_hub_download would delete what an interrupted download left.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    dataset, commit, name = re.fullmatch(r"hf://datasets/(.+?)@(\w+)/(.+)", file).groups()
    url = hf_hub_url(dataset, name, repo_type="dataset", revision=commit)
    metadata = get_hf_file_metadata(url)
    with open(path, "ab") as target:
        if target.tell() > metadata.size:
            target.truncate(0)
        http_get(
            url,
            target,
            resume_size=target.tell(),
            expected_size=metadata.size,
            headers=build_hf_headers(headers={"Accept-Encoding": "identity"}),
            displayed_filename=os.path.basename(name),
            tqdm_class=functools.partial(tqdm, leave=False),
        )
    if len(metadata.etag) == 64 and sha256(path) != metadata.etag:
        path.unlink()
        raise OSError(f"the bytes of {name} are not those that the Hub names: other sha256")
    return path
