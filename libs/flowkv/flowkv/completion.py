"""Completion of commands and options by the Tab key, for bash, zsh and fish.

  source <(flowkv completion bash)       in ~/.bashrc
  source <(flowkv completion zsh)        in ~/.zshrc, behind compinit
  flowkv completion fish | source        in ~/.config/fish/config.fish

Options are read from each command's own help.
"""

from __future__ import annotations

from flowkv.terminal import make_parser

BASH = r"""_flowkv() {
  local word=${COMP_WORDS[COMP_CWORD]}
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
  elif [[ $word == -* ]]; then
    local options=$(flowkv "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '--[a-z-]+')
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}
complete -o filenames -F _flowkv flowkv
"""
SHELLS = {
    "bash": BASH,
    "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{BASH}",
    "fish": r"""complete -c flowkv -n __fish_use_subcommand -f -a "COMMANDS"
complete -c flowkv -n 'not __fish_use_subcommand' -a '(
  flowkv (commandline -opc)[2] --help 2>/dev/null | string match -rag -- "(--[a-z-]+)")'
""",
}


def main(argv: list[str]) -> int:
    from flowkv.__main__ import names

    parser = make_parser("completion", __doc__, needs_nats=False)
    parser.add_argument("shell", choices=SHELLS)
    print(SHELLS[parser.parse_args(argv).shell].replace("COMMANDS", " ".join(names())), end="")
    return 0
