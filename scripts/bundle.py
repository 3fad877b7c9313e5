"""`make bundle`: the image millrace/bundle:local, which carries a worker into any image (docs/fargate.md)."""

import os
import sys
from typing import Final

from compose_test import ROOT, prepare_wheels, run

from buildenv.images import tag_of

TAG: Final = "millrace/bundle:local"


def main() -> int:
    prepare_wheels()
    base = os.environ.get("BASE_IMAGE", tag_of("base"))
    build = [
        "docker",
        "build",
        "--quiet",
        "--file",
        "deploy/bundle.Dockerfile",
        "--build-arg",
        f"BASE_IMAGE={base}",
        "--tag",
        TAG,
    ]
    run(*build, str(ROOT), env={**os.environ, "DOCKER_BUILDKIT": "0"})
    print(f"made {TAG}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
