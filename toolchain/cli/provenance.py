"""Where a bundle comes from, for those who get it: ``sign``, ``verify-signature``, ``bom``, ``card``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.options import BundleArgument, JsonOption, VerboseOption

if TYPE_CHECKING:
    from toolchain.formats.bundle import Bundle

LicenseOption = Annotated[
    list[str],
    typer.Option("--license", metavar="COMPONENT=SPDX", help="A checkpoint's licence, if the recipe states none."),
]
FileOption = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it there instead.")]


def sign(
    bundle: BundleArgument,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PEM", help="A private key on curve P-256, P-384 or P-521.")
    ] = None,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign with an identity by Sigstore; needs a network.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Sign a bundle, after checking its files, into its model.sig. Needs sora-compile[signing]."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.errors import RecipeError
        from toolchain.formats.signature import sign_bundle

        if (key is None) != keyless:
            raise RecipeError("sign: give --key PEM or --keyless, one of the two")
        signature = sign_bundle(bundle, key)
        console.answer({"signature": str(signature)}, str(signature))


def verify_signature(
    bundle: BundleArgument,
    key: Annotated[Path | None, typer.Option("--key", metavar="PEM", help="The signer's public key.")] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", metavar="NAME", help="Who signed keyless; needs a network.")
    ] = None,
    provider: Annotated[
        str | None, typer.Option("--identity-provider", metavar="URL", help="Who vouches for the identity.")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hold every file of a bundle against its signature. Needs sora-compile[signing]."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.errors import RecipeError
        from toolchain.formats import signature

        by: Path | signature.Signer
        if key is not None and identity is None and provider is None:
            by = key
        elif key is None and identity is not None and provider is not None:
            by = signature.Signer(identity, provider)
        else:
            raise RecipeError("verify-signature: give --key PEM, or --identity NAME with --identity-provider URL")
        signature.verify_signature(bundle, by)
        console.answer({"bundle": str(bundle), "signed": True}, f"{bundle}: every file is as it was signed")


def bom(
    bundle: BundleArgument,
    output: FileOption = None,
    licenses: LicenseOption = [],  # noqa: B006 - typer copies it
    verbose: VerboseOption = False,
) -> None:
    """Print a bundle's bill of materials (CycloneDX 1.6), from its manifest and recipe."""
    from toolchain.ui.console import Console

    with Console(False, verbose):
        from toolchain.formats.bom import bill_of_materials

        _give(bill_of_materials, bundle, licenses, output)


def card(
    bundle: BundleArgument,
    output: FileOption = None,
    licenses: LicenseOption = [],  # noqa: B006 - typer copies it
    verbose: VerboseOption = False,
) -> None:
    """Print a bundle's model card (Markdown), from its manifest and recipe."""
    from toolchain.ui.console import Console

    with Console(False, verbose):
        from toolchain.ui.card import model_card

        _give(model_card, bundle, licenses, output)


def _licenses(given: list[str]) -> dict[str, str]:
    from toolchain.errors import RecipeError

    pairs = [(text, *text.partition("=")) for text in given]
    for text, component, _, license_ in pairs:
        if not component or not license_:
            raise RecipeError(f"--license {text}: expected COMPONENT=SPDX, such as transformer=Apache-2.0")
    return {component: license_ for _, component, _, license_ in pairs}


def _give(
    text_of: Callable[[Bundle, Mapping[str, str]], str], bundle: Path, licenses: list[str], output: Path | None
) -> None:
    """A text about a bundle, to a file, whole or not at all, or to stdout."""
    import toolchain
    from toolchain.system.files import check_file, whole_file

    text = text_of(toolchain.load_bundle(bundle), _licenses(licenses))
    if output is None:
        typer.echo(text, nl=False)
        return
    check_file("-o", output)
    with whole_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(output)
