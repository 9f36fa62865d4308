"""Make .dvc/plots.html, the page into which `dvc plots show` and `dvc plots diff` put the plots.

    python .ci/plots_page.py

DVC's own page loads Vega from the network. This one holds the same versions of the same scripts, from npm.
Run it again after an upgrade of DVC that changes them (tests/repository/test_plots_page.py notices).
"""

import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from dvc_render.vega import VegaRenderer

PAGE = Path(__file__).resolve().parents[1] / ".dvc/plots.html"
NOTICE = """\
Page for `dvc plots`, which needs no network. Made by .ci/plots_page.py from {packages}.

{licence}
The scripts contain parts of other packages. Under the licence above: d3-array, d3-color, d3-dispatch,
d3-dsv, d3-force, d3-format, d3-geo, d3-geo-projection, d3-hierarchy, d3-interpolate, d3-path, d3-quadtree,
d3-scale, d3-shape, d3-time, d3-time-format, d3-timer (Copyright 2010-2021 Mike Bostock), vega-themes, vega-
tooltip, vega-schema-url-parser (University of Washington Interactive Data Lab).

ISC: d3-delaunay (Copyright 2018 Observable, Inc.), d3-scale-chromatic, internmap, topojson-client
(Copyright 2012-2021 Mike Bostock), delaunator (Copyright 2017 Mapbox), semver (Copyright Isaac Z. Schlueter
and Contributors).
Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is
hereby granted, provided that the above copyright notice and this permission notice appear in all copies.
THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE
INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR
ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF
USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF
OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.

MIT: clone (Copyright 2011-2015 Paul Vorbach), fast-deep-equal, fast-json-stable-stringify (Copyright 2017
Evgeny Poberezkin), fast-json-patch (Copyright 2013, 2014, 2020 Joachim Wester), json-stringify-pretty-
compact (Copyright 2014, 2016, 2017, 2019, 2021 Simon Lydell).
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
the Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions: The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND,
EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR
PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
HTML = """\
<!DOCTYPE html>
<!--
{notice}-->
<html>
<head>
<meta charset="utf-8">
{{refresh_tag}}
<title>DVC Plot</title>
{scripts}
<style>table {{ border-spacing: 15px; }}</style>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def main() -> None:
    packages = re.findall(r"/npm/([\w-]+)@([\d.]+)", VegaRenderer.SCRIPTS)
    with tempfile.TemporaryDirectory() as folder:
        scripts = [script(name, version, Path(folder)) for name, version in packages]
        licence = member(Path(folder) / f"vega-{packages[0][1]}.tgz", "LICENSE")
    named = ", ".join(f"{name} {version}" for name, version in packages)
    notice = NOTICE.format(packages=named, licence=licence)
    PAGE.write_text(HTML.format(notice=notice, scripts="\n".join(scripts)), encoding="utf-8")


def script(name: str, version: str, folder: Path) -> str:
    """Return the package's minified script in its HTML element; it must not be able to end it."""
    subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
    text = member(folder / f"{name}-{version}.tgz", f"build/{name}.min.js")
    text = re.sub(r"//# sourceMappingURL=\S+\s*$", "", text)
    if found := re.search(r"</script|<!--|\{(?:scripts|plot_divs|refresh_tag)\}", text):
        raise SystemExit(f"{name} {version} contains {found[0]}: it cannot stand in the page.")
    return f'<script data-package="{name}@{version}">\n{text}</script>'


def member(archive: Path, name: str) -> str:
    with tarfile.open(archive) as packed:
        file = packed.extractfile(f"package/{name}")
        assert file is not None
        return file.read().decode("utf-8")


if __name__ == "__main__":
    main()
