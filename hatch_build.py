"""Builds the compiled CPU backend when gyrokv is installed. ``python hatch_build.py`` builds it in place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand: hatchling is there only while pip builds
    BuildHookInterface = object

_FOLDER = Path(__file__).resolve().parent / "src/gyrokv/backends/cpu"


def _load():
    spec = importlib.util.spec_from_file_location("gyrokv_cpu_build", _FOLDER / "build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CompiledBackend(BuildHookInterface):
    """Compiles for wheels and for editable installations; without a compiler the installation goes on without."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict) -> None:
        cpu = _load()
        try:
            built = cpu.build_in_place()
        except cpu.BuildError as error:
            for line in cpu.warning(error).splitlines():
                self.app.display_warning(line)
            build_data["artifacts"].append(_pattern(cpu.FAILURE))
            return
        self.app.display_info(f"built {built.path.name} with {built.compiler}: {', '.join(built.levels)}")
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform_tag()}"
            build_data["artifacts"].append(_pattern(built.path))


def _pattern(path: Path) -> str:
    return "/" + path.relative_to(Path(__file__).resolve().parent).as_posix()


def _platform_tag() -> str:
    from packaging.tags import sys_tags  # hatchling requires it

    # the tag of this system alone: nobody has checked the library against older ones
    tags = (tag.platform for tag in sys_tags())
    return next(tag for tag in tags if "manylinux" not in tag and "musllinux" not in tag)


if __name__ == "__main__":
    sys.exit(_load().main(sys.argv[1:]))
