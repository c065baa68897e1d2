#!/usr/bin/env python
"""Write constraints.txt: one version of each package that an extra of setup.cfg needs, for Python 3.10 to 3.13.

make lock              # keep the versions in the file, add what is missing, drop what nothing needs
make lock UPGRADE=1    # take the newest versions
.ci/lock.py --check    # without a network: does the file cover setup.cfg and what is installed here?
"""

import argparse
import configparser
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / 'constraints.txt'
PYTHONS, AFTER = ('3.10', '3.11', '3.12', '3.13'), '3.14'
# Other platforms get the same versions: a constraint for a package that is not installed does nothing.
PLATFORM = "sys_platform == 'linux' and platform_machine == 'x86_64' and implementation_name == 'cpython'"
HEADER = '# The exact versions that CI and `make` install, for each Python; `make lock` keeps this file.'


def settings() -> configparser.ConfigParser:
    """setup.cfg."""
    read = configparser.ConfigParser()
    read.read(ROOT / 'setup.cfg')
    return read


def extras() -> list[str]:
    """Names of the extras, which can all be installed together."""
    return list(settings()['options.extras_require'])


def direct_requirements() -> Iterator[Requirement]:
    """What the package and its extras ask for."""
    cfg = settings()
    texts = [cfg['options']['install_requires'], *(cfg['options.extras_require'][name] for name in extras())]
    for line in '\n'.join(texts).splitlines():
        if line.strip() and not line.startswith('#'):
            yield Requirement(line)


def write(upgrade: bool) -> None:
    """Resolve all extras with uv and write the file."""
    uv = shutil.which('uv', path=Path(sys.executable).parent) or shutil.which('uv')
    if uv is None:
        sys.exit("error: this needs uv: pip install 'mmseg-volo[dev]'")
    before = pins(FILE.read_text())
    project = [
        '[project]',
        'name = "mmseg-volo"',
        'version = "0"',
        f'requires-python = ">={PYTHONS[0]}"',
        f'dependencies = {[str(requirement) for requirement in direct_requirements()]}',
        '[tool.uv]',
        f'environments = ["{PLATFORM} and python_full_version < \'{AFTER}\'"]',
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'pyproject.toml').write_text('\n'.join(project))
        out = shutil.copy(FILE, folder)  # its versions are preferred
        command = [uv, 'pip', 'compile', 'pyproject.toml', '--universal', '--python-version', PYTHONS[0], '--quiet']
        command += ['--no-annotate', '--no-header', '--output-file', out] + ['--upgrade'] * upgrade
        if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
            sys.exit('error: uv cannot resolve the extras; constraints.txt is unchanged')
        lines = sorted(map(shortened, Path(out).read_text().splitlines()))
    text = '\n'.join([HEADER, *lines, ''])
    FILE.write_text(text)
    after = pins(text)
    for what, names in (('added', after.keys() - before.keys()), ('dropped', before.keys() - after.keys())):
        print(f'{what}:', ', '.join(sorted(names)) or 'nothing')


def shortened(line: str) -> str:
    """A line of uv's without the clauses of its marker that hold on ``PLATFORM`` and in ``PYTHONS``."""
    pin, _, marker = line.partition(' ; ')
    if ' or ' not in marker:
        clauses = [clause for clause in marker.split(' and ') if clause.startswith('python_full_version')]
        marker = ' and '.join(clause for clause in clauses if not clause.endswith(f"'{AFTER}'"))
    marker = re.sub(r"python_full(_version [<>=]+ '\d+\.\d+')", r'python\1', marker)  # as people write it
    return f'{pin} ; {marker}'.replace("'", '"').removesuffix(' ; ')


def pins(text: str) -> dict[str, list[Requirement]]:
    """Lines of a constraints file by package."""
    found: dict[str, list[Requirement]] = {}
    for line in text.splitlines():
        if line and not line.startswith('#'):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def problems() -> Iterator[str]:
    """Requirements that the file does not fix, or fixes to a version that they do not allow, one sentence each."""
    yield from direct_problems()
    yield from installed_problems()


def direct_problems() -> Iterator[str]:
    """Problems with what setup.cfg asks for."""
    pinned = pins(FILE.read_text())
    for python in PYTHONS:
        environment = {**default_environment(), 'python_version': python, 'python_full_version': f'{python}.0'}
        for requirement in direct_requirements():
            yield from _problem(requirement, pinned, environment)


def installed_problems() -> Iterator[str]:
    """Problems with what that needs in turn, as far as the versions in the file are installed here."""
    pinned, seen = pins(FILE.read_text()), set[str]()
    queue = list(direct_requirements())
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in seen and not requirement.extras:
            continue
        seen.add(name)
        yield from _problem(requirement, pinned, dict(default_environment()))
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not any(line.specifier.contains(installed, prereleases=True) for line in pinned.get(name, [])):
            continue  # what another version needs does not matter
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({'extra': e}) for e in ('', *requirement.extras)):
                queue.append(needed)


def _problem(requirement: Requirement, pinned: dict[str, list[Requirement]], environment: dict) -> Iterator[str]:
    if requirement.marker is not None and not requirement.marker.evaluate({**environment, 'extra': ''}):
        return
    lines = pinned.get(canonicalize_name(requirement.name), [])
    versions = {
        re.sub('^==', '', str(line.specifier))
        for line in lines
        if line.marker is None or line.marker.evaluate(environment)
    }
    where = f'constraints.txt for Python {environment["python_version"]}'
    if len(versions) != 1:
        yield f'{where} must have one version of {requirement.name}, got {sorted(versions) or "none"}'
    elif not requirement.specifier.contains(versions.copy().pop(), prereleases=True):
        yield f'{where} has {requirement.name} {versions.pop()}, but {requirement} is needed'


def main() -> int:
    """Write or check the file, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if make lock is due')
    parser.add_argument('--upgrade', action='store_true', help='take the newest versions')
    args = parser.parse_args()
    if not args.check:
        write(args.upgrade)
    found = list(dict.fromkeys(problems()))
    print(*(f'error: {problem}; make lock adds it' for problem in found), sep='\n', end='\n' if found else '')
    return int(bool(found))


if __name__ == '__main__':
    sys.exit(main())
