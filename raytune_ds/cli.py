"""`raytune-ds VERB` and `python -m raytune_ds VERB`. Each verb's module is imported when it is used."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from raytune_ds.command import add_config_arguments, guarded, parser
from raytune_ds.console import err, out, say
from raytune_ds.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failed run, 2 for a mistake of the user's."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["train"]:
        from raytune_ds import train

        return train.main(given[1:])
    if given[:1] == ["sweep"]:
        from raytune_ds.sweep import __main__ as sweep

        return sweep.main(given[1:])
    arguments = _parser().parse_args(given)
    return guarded(lambda: arguments.run(arguments) or 0, debug=arguments.debug)


def _parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="raytune-ds", description="Fine-tunes DeepSeek-family models on Ray."
    )
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("train", add_help=False, help="fine-tune a model (also: python -m raytune_ds.train)")
    verbs.add_parser(
        "sweep", add_help=False, help="search the settings of a run (also: python -m raytune_ds.sweep)"
    )
    for name, summary, run, add in (
        ("data", "prepare data and show what will be trained on", _data, _add_data),
        ("chat", "talk to a finished run", _chat, _add_chat),
        ("generate", "answer prompts with a finished run", _generate, _add_generate),
        ("compare", "runs side by side: a table, and their curves", _compare, _add_compare),
        ("verify", "proof that a run was trained on each row of each epoch once", _verify, _add_verify),
        ("render", "the files of a cluster for a run", _render, _add_render),
        ("doctor", "what this node or a cluster has, and what to mend", _doctor, _add_doctor),
        ("demo", "the bundled demo: a tiny model learns a domain", _demo, _add_demo),
    ):
        base = parser(f"raytune-ds {name}", summary)
        verb = verbs.add_parser(name, help=summary, parents=[base], add_help=False)
        add(verb)
        verb.set_defaults(run=run)
    return command


# -------------------------------------------------------------------------------------------------- data


def _add_data(verb: argparse.ArgumentParser) -> None:
    add_config_arguments(verb)
    verb.add_argument("--examples", type=int, default=3, metavar="N", help="examples to show (3)")
    verb.add_argument(
        "--run",
        dest="run_dir",
        metavar="DIR",
        help="with --step: the rows of steps of this run, and nothing else",
    )
    verb.add_argument(
        "--step",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="a step of --run, trained on yet or not; may be given several times",
    )


def _data(arguments: argparse.Namespace) -> int:
    if arguments.run_dir is not None or arguments.step:
        return _data_of_steps(arguments)
    from raytune_ds.compose import compose, dump

    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    from raytune_ds import cluster
    from raytune_ds.check import check
    from raytune_ds.data.page import write_page
    from raytune_ds.data.show import show
    from raytune_ds.launch import assign

    checked = check(config, to_train=False)
    cluster.connect(arguments.debug)
    assignment = assign(checked)
    show(assignment.store, assignment.tokenizer, arguments.examples)
    write_page(assignment.store, assignment.tokenizer, _as_typed(arguments), dump(config))
    return 0


def _as_typed(arguments: argparse.Namespace) -> str:
    files = [word for file in arguments.config for word in ("--config", file)]
    return shlex.join(["raytune-ds", "data", *files, *arguments.overrides])


def _data_of_steps(arguments: argparse.Namespace) -> int:
    if arguments.run_dir is None or not arguments.step:
        raise UserError("--run and --step go together: raytune-ds data --run DIR --step 120")
    if arguments.config or arguments.overrides:
        raise UserError("--run: the run has its own config; leave --config and key=value out.")
    from raytune_ds.steps import show_steps

    show_steps(arguments.run_dir, arguments.step)
    return 0


# ------------------------------------------------------------------------------------- chat and generate


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--run", required=True, dest="run_dir", metavar="DIR", help="the run directory")
    verb.add_argument("--system", metavar="TEXT", help="a system message")
    verb.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the longest answer, in tokens (256)"
    )
    verb.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time (0)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (1.0)")


def _add_chat(verb: argparse.ArgumentParser) -> None:
    _add_model(verb)


def _add_generate(verb: argparse.ArgumentParser) -> None:
    _add_model(verb)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is streamed")
    source.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or JSON lines with prompt or messages"
    )
    verb.add_argument("--output", metavar="FILE", help="write JSON lines there instead of printing")


def _chat(arguments: argparse.Namespace) -> int:
    from raytune_ds.generate import Generator, chat

    chat(Generator.of_run(arguments.run_dir), _sampling(arguments), arguments.system)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from raytune_ds.generate import Generator, read_prompts, write_answers, write_now

    conversations = read_prompts(arguments.prompts) if arguments.prompts else [_user(arguments.prompt)]
    if arguments.output and Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output}: is there already; choose another name.")
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise UserError(f"--output {arguments.output}: there is no such folder.")
    if arguments.system:
        conversations = [[{"role": "system", "content": arguments.system}, *c] for c in conversations]
    generator = Generator.of_run(arguments.run_dir)
    if arguments.prompt and not arguments.output:
        generator.stream(conversations[0], _sampling(arguments), write_now)
        write_now("\n")
        return 0
    answers = generator.answer(conversations, _sampling(arguments))
    if arguments.output:
        write_answers(conversations, answers, Path(arguments.output))
        say(f"{len(conversations)} answers written to {arguments.output}")
    else:
        for conversation, answer in zip(conversations, answers, strict=True):
            out.print(f"> {conversation[-1]['content']}", style="dim", markup=False)
            say(answer)
    return 0


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _sampling(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]  # imported late
    from raytune_ds.generate import Sampling

    return Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)


# ----------------------------------------------------------------------------------------------- compare


def _add_compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", nargs="*", metavar="RUN", help="run directories, two or more")
    verb.add_argument("--plot", metavar="FILE", help="draw the loss curves into a .png or .svg file too")


def _compare(arguments: argparse.Namespace) -> int:
    from raytune_ds.compare import compare

    compare(arguments.runs, arguments.plot)
    return 0


# ------------------------------------------------------------------------------------------------ verify


def _add_verify(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--run", required=True, nargs="+", dest="run_dirs", metavar="DIR", help="run directories, one or more"
    )


def _verify(arguments: argparse.Namespace) -> int:
    from raytune_ds.verify import verify

    return verify(arguments.run_dirs)


# ------------------------------------------------------------------------------------------------ render


def _add_render(verb: argparse.ArgumentParser) -> None:
    from raytune_ds.deploy.render import TARGETS

    add_config_arguments(verb)
    verb.add_argument(
        "--target", required=True, metavar="TARGET", help=f"what the file is for: {', '.join(TARGETS)}"
    )
    verb.add_argument("--output", metavar="FILE", help="write it there instead of printing it")


def _render(arguments: argparse.Namespace) -> int:
    from raytune_ds.aliases import close
    from raytune_ds.compose import compose, dump
    from raytune_ds.deploy.render import TARGETS, describe, render

    if arguments.target not in TARGETS:
        near = close(arguments.target, tuple(TARGETS), 0.6)
        raise UserError(
            f"--target {arguments.target}: "
            + (f"did you mean {near[0]}? " if near else "")
            + f"There are {', '.join(TARGETS)}."
        )
    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    text, layout = render(config, arguments.target)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        _write_new(arguments.output, text)
        say(f"written to {arguments.output}, which begins with how it is used")
    err.print(describe(layout), markup=False)
    return 0


def _write_new(path: str, text: str) -> None:
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"--output {path}: is there already; choose another name.") from error
    except OSError as error:
        raise UserError(f"--output {path}: can't be written: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------ doctor


def _add_doctor(verb: argparse.ArgumentParser) -> None:
    add_config_arguments(verb)
    verb.add_argument(
        "--cluster", action="store_true", help="all nodes of the Ray cluster, not this one alone"
    )
    verb.add_argument("--json", action="store_true", help="print JSON in place of a table")


def _doctor(arguments: argparse.Namespace) -> int:
    from raytune_ds.compose import compose, dump
    from raytune_ds.doctor.verb import doctor

    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    return doctor(config, on_cluster=arguments.cluster, json=arguments.json, debug=arguments.debug)


# -------------------------------------------------------------------------------------------------- demo


def _add_demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--storage", default="~/raytune_ds", metavar="DIR", help="where the runs go (~/raytune_ds)"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from raytune_ds.demo.run import demo

    demo(arguments.storage, debug=arguments.debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
