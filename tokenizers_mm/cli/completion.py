"""`tokenizers-mm completion`: a script for the shell, made from the parsers of all verbs."""

import argparse

SUMMARY = "Print a script that completes verbs and options in a shell."

BASH = """# eval "$(tokenizers-mm completion bash)"
_tokenizers_mm() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{verbs}"
  else
    case "$verb" in
{cases}
    esac
  fi
  COMPREPLY=()
  while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -W "$words" -- "$word")
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "$word" in -*) ;; *) while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$word") ;; esac
  fi
}}
complete -o filenames -F _tokenizers_mm tokenizers-mm
"""

ZSH = """# eval "$(tokenizers-mm completion zsh)"
autoload -Uz bashcompinit && bashcompinit
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument(
        "shell", choices=("bash", "zsh"), help='put `eval "$(tokenizers-mm completion bash)"` in ~/.bashrc'
    )


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    print(script(options.shell), end="")


def script(shell: str) -> str:
    """The script for "bash" or "zsh" (which runs bash completions itself)."""
    from tokenizers_mm.cli import VERBS, parser  # the table that this verb stands in

    cases = []
    for name in VERBS:
        command = next(p for p in _subparsers(parser()) if p.prog.split()[-1] == name)
        words = sorted({option for action in command._actions for option in action.option_strings})
        words += [str(c) for action in command._actions if not action.option_strings for c in action.choices or ()]
        cases.append(f'      {name}) words="{" ".join(words)}" ;;')
    made = BASH.format(verbs=" ".join([*VERBS, "--help", "--version"]), cases="\n".join(cases))
    return made if shell == "bash" else ZSH + made


def _subparsers(whole: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (verbs,) = [action for action in whole._actions if isinstance(action, argparse._SubParsersAction)]
    return list(verbs.choices.values())
