"""Writes kafka-jars.txt anew: `python -m eoframework.dev.pin_jars`, on a machine with Maven (`mvn`).

Maven resolves the run-time dependencies of the broker; every jar's sha256 and size is taken from the file it verified.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from eoframework.dev.jars import KAFKA_VERSION, LIST, Jar

# The binding must speak the slf4j 1.7 that Kafka depends on; a 2.x binding is silently ignored by it.
SLF4J_BINDING = ("org.slf4j", "slf4j-simple", "1.7.36")

_POM = """<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>pin</groupId><artifactId>pin</artifactId><version>1</version><dependencies>{}</dependencies></project>"""
_DEPENDENCY = "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>"
_RESOLVED = re.compile(r"^\s+([\w.\-]+):([\w.\-]+):jar:([\w.\-]+):(?:compile|runtime):(/\S+\.jar)", re.MULTILINE)


def resolve(directory: Path) -> list[Jar]:
    """The broker's run-time jars as Maven resolves them, in `directory`."""
    roots = [("org.apache.kafka", "kafka_2.13", KAFKA_VERSION), SLF4J_BINDING]
    (directory / "pom.xml").write_text(_POM.format("".join(_DEPENDENCY.format(*root) for root in roots)))
    listing = directory / "resolved.txt"
    options = ["-DincludeScope=runtime", "-DoutputAbsoluteArtifactFilename=true", f"-DoutputFile={listing}"]
    subprocess.run(["mvn", "-q", "-B", "dependency:list", *options], cwd=directory, check=True, stdout=sys.stderr)
    return [_jar(*match) for match in _RESOLVED.findall(listing.read_text())]


def _jar(group: str, artifact: str, version: str, file: str) -> Jar:
    content = Path(file).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return Jar(group=group, artifact=artifact, version=version, sha256=sha256, size=len(content))


def main() -> None:
    """Resolve and write the list."""
    with TemporaryDirectory() as directory:
        jars = resolve(Path(directory))
    lines = [f"{jar.group}:{jar.artifact}:{jar.version} {jar.sha256} {jar.size}" for jar in jars]
    header = f"# Apache Kafka {KAFKA_VERSION} and its run-time dependencies; written by eoframework/dev/pin_jars.py\n"
    LIST.write_text(header + "\n".join(sorted(lines)) + "\n")
    sys.stderr.write(f"{LIST}: {len(jars)} jars, {sum(jar.size for jar in jars) / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
