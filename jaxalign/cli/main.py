"""`jaxalign VERB --config=FILE.py[:ARG] [--config.a.b=VALUE ...] --workdir=DIR`."""

from __future__ import annotations

import importlib
import os
import re
import sys

from absl import flags

from jaxalign.types import UserError

VERBS = {
    "pipeline": "raw text to aligned models and a report, all stages of one config",
    "train": "one stage: pretraining, SFT, reward model, DPO, PPO, GRPO (--stage picks one of several)",
    "sample": "continue prompts with a trained model, a Hugging Face directory, either with an adapter",
    "chat": "talk with one of these, in the terminal or through a pipe",
    "eval": "held-out metrics of a trained stage, and gold rewards where the world knows them",
    "inspect": "how the data becomes tokens and masks, and how the weights are laid out",
    "validate": "everything but the training: config, tokenizer, template, data and masks; exit 0 or 2",
    "plan": "memory, FLOPs, collectives and step time of a config on devices that need not be there",
    "reproduce": "a published result, run again over several seeds, beside the committed curve; without a name, which there are",
    "convert": "between Hugging Face safetensors and jaxalign weights; adapters in and out",
}

HELP = "usage: jaxalign VERB [flags]\n\n" + "\n".join(f"  {v:10} {t}" for v, t in VERBS.items()) + (
    "\n\n  --config=FILE.py[:ARG]   a file with get_config(arg); any field: --config.stage.optim.lr=1e-4"
    "\n  --workdir=DIR            where everything of the run goes"
    "\n  --processes=N            start N processes on this machine (jax.distributed); on clusters use --distributed"
    "\n\nConfigs are Python files and are executed: run only those you trust. jaxalign VERB --help lists the verb's flags."
)


def common(fv: flags.FlagValues, config: bool = True) -> None:
    """The flags that every verb has."""
    from ml_collections import config_flags

    if config:
        config_flags.DEFINE_config_file("config", None, "the config file", flag_values=fv, lock_config=True)
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=fv)
    flags.DEFINE_integer("processes", 1, "processes to start on this machine", lower_bound=1, flag_values=fv)
    flags.DEFINE_bool("distributed", False, "join the processes that SLURM, Kubernetes or a TPU pod has started", flag_values=fv)
    flags.DEFINE_bool("help", False, "this text", short_name="h", flag_values=fv)


def parse(fv: flags.FlagValues, argv: list[str]) -> list[str]:
    """Positional arguments; any mistake on the command line as a UserError with the nearest right name."""
    own, sys.argv = sys.argv, argv  # where config_flags looks for the overrides
    try:
        rest = fv(argv)[1:]
        if "config" in fv and fv.config is not None:
            fv.config.lock()  # a file that could not be read says so only when it is used
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(_explain(e, fv, argv)) from None
    except OSError as e:
        why = e.strerror or str(e).splitlines()[-1].split("] ")[-1]
        raise UserError(f"--config={_path(argv)}: {why}; paths are relative to {os.getcwd()}") from None
    except SyntaxError as e:
        raise UserError(f"--config: {e.filename}:{e.lineno}: {e.msg}") from None
    finally:
        sys.argv = own


def _path(argv: list[str]) -> str:
    return next((a.split("=", 1)[1] if "=" in a else b for a, b in zip(argv, [*argv[1:], ""]) if re.fullmatch("--?config(=.*)?", a)), "")


def _explain(e: Exception, fv: flags.FlagValues, argv: list[str]) -> str:
    """ml_collections reports an unknown key by a bare AttributeError: find it and name its neighbours."""
    from ml_collections import ConfigDict, config_flags

    from jaxalign.build import nearest

    try:
        plain = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=plain, sys_argv=[])
        plain(["jaxalign", f"--config={_path(argv)}"])
        config = plain.config
    except Exception:  # the config itself did not load
        config = None
    if isinstance(config, ConfigDict):
        for a in argv:
            key = a.split("=")[0].lstrip("-")
            if not key.startswith("config."):
                continue
            at, *rest = config, *key.split(".")[1:]
            for k in rest:
                if not isinstance(at, ConfigDict) or k.split("[")[0] not in at:
                    return f"--{key}: no such field {k!r};{nearest(k, list(at.keys()) if isinstance(at, ConfigDict) else [])}"
                at = at.get(k) if "[" not in k else None
    if isinstance(e, flags.UnrecognizedFlagError):
        return f"unknown flag --{e.flagname};{nearest(e.flagname, [f for f in fv if not f.startswith('config.')])}"
    return f"{e}"


def run(argv: list[str] | None = None) -> None:
    """Entry point. Exit code 0, 2 for what the user can mend, 143 when interrupted after saving."""
    if argv is None:
        _huge_pages()
    argv = list(sys.argv if argv is None else argv)
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(HELP)
        sys.exit(0 if len(argv) > 1 else 2)
    verb = argv[1]
    _environment()
    try:
        if verb not in VERBS:
            from jaxalign.build import nearest

            raise UserError(f"unknown verb {verb!r};{nearest(verb, list(VERBS))}")
        module = importlib.import_module(f"jaxalign.cli.{verb}")
        fv = flags.FlagValues()
        module.define(fv)
        rest = parse(fv, [f"jaxalign {verb}", *argv[2:]])
        if fv.help:
            print(f"jaxalign {verb}: {VERBS[verb]}\n{fv.get_help()}")
            return
        from jaxalign.cli import launch

        if fv.processes > 1 and not launch.is_child():
            sys.exit(launch.spawn(fv.processes, argv))
        with launch.joined(fv.distributed):
            module.main(fv, rest)
    except UserError as e:
        print(f"jaxalign: error: {e}", file=sys.stderr)
        sys.exit(2)


def _huge_pages() -> None:
    """Start this command once more, with huge pages from malloc (glibc on Linux, which asks for them at its start only).

    XLA's CPU backend gives a step's buffers back to the system when the step is over, and takes them anew for the next one: in
    pages of 4 KiB that is a quarter of a million page faults a step for a model of 15 M parameters, a fifth of its time.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and "CS_GNU_LIBC_VERSION" in os.confstr_names and os.confstr("CS_GNU_LIBC_VERSION"):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _environment() -> None:
    """What must be settled before anything imports jax."""
    # A user meets compile time first, and most of it only once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.expanduser("~"), ".cache", "jaxalign"))
    # Programs for several simulated CPU devices that come from that cache can deadlock under this scheduler (jax 0.10).
    xla = os.environ.get("XLA_FLAGS", "")
    if ("JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in xla) and "scheduler" not in xla:
        os.environ["XLA_FLAGS"] = f"{xla} --xla_cpu_enable_concurrency_optimized_scheduler=false".strip()
    # As `python -m` does: rewards and objectives named by import path are found where the user stands.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def needed(fv: flags.FlagValues, *names: str) -> None:
    for n in names:
        if fv[n].value is None:
            raise UserError(f"--{n} is missing: jaxalign VERB --config=configs/quickstart.py --workdir=runs/quickstart")
