"""Signatures of bundles, by OpenSSF model signing: one file in the bundle that holds for all others.

The statement that is signed lists every file of the folder with its sha256, so it changes nothing in the manifest, and
a file that was added is found as one that was changed or removed is. The optional package ``model-signing`` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import BundleError, RecipeError, ResourceError
from toolchain.formats.bundle import load_bundle
from toolchain.system.files import whole_file

SIGNATURE_FILE = "model.sig"


@dataclass(frozen=True)
class Signer:
    """Who must have signed, where no key is used: an identity, and the OpenID Connect provider that vouches for it."""

    identity: str
    provider: str


def sign_bundle(path: Path, key: Path | None) -> Path:
    """Check a bundle's files and sign all that is in its folder; the signature's path.

    Args:
        key: a private key on one of the curves P-256, P-384 and P-521, PEM, without a password. None: Sigstore, with
            the credentials that are at hand or a browser; needs a network.

    Raises:
        BundleError: the bundle is damaged, or has a link or something else in it that cannot be signed.
        RecipeError: the key cannot be used.
        ResourceError: the signature cannot be written, Sigstore does not sign, or the package is not installed.
    """
    load_bundle(path).check_files()
    library = _library()
    config = library.signing.Config().set_hashing_config(_hashing(library))
    if key is not None:
        _with_key(key, lambda: config.use_elliptic_key_signer(private_key=key))
    signature = path / SIGNATURE_FILE
    with whole_file(signature, "sign") as partial:
        try:
            if key is None:
                config.use_sigstore_signer(use_ambient_credentials=True)
            config.sign(path, partial)
        except ValueError as e:
            raise BundleError(f"'{path}': cannot be signed: {_told(e)}") from e
        except Exception as e:
            if key is not None:
                raise
            # Sigstore's, of many kinds: no network, no identity
            raise ResourceError(f"'{path}': Sigstore did not sign: {_told(e)}") from e
    return signature


def verify_signature(path: Path, by: Path | Signer) -> None:
    """Hold every file in a bundle's folder against its signature.

    Args:
        by: a public key, PEM; or who must have signed with Sigstore, for which a network is needed.

    Raises:
        BundleError: there is no signature, another has signed, or a file was changed, added or removed.
        RecipeError: the key cannot be used.
        ResourceError: the package is not installed.
    """
    signature = path / SIGNATURE_FILE
    if not signature.is_file():
        raise BundleError(f"'{path}' is not signed: there is no {SIGNATURE_FILE} in it; see 'sora-compile sign'")
    library = _library()
    config = library.verifying.Config().set_hashing_config(_hashing(library))
    if isinstance(by, Path):
        _with_key(by, lambda: config.use_elliptic_key_verifier(public_key=by))
    try:
        if isinstance(by, Signer):
            config.use_sigstore_verifier(identity=by.identity, oidc_issuer=by.provider)
        config.verify(path, signature)
    except Exception as e:  # a damaged signature makes the package raise nearly anything
        raise BundleError(f"'{path}': not as it was signed: {_told(e)}") from e


def _library() -> Any:
    try:
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as e:
        raise ResourceError("signatures need 'model-signing': pip install 'sora-compile[signing]'") from e
    return model_signing


def _hashing(library: Any) -> Any:
    """All files but the signature; by itself the package would leave out those of git, too."""
    return library.hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _with_key(key: Path, use: Any) -> None:
    try:
        use()
    except OSError as e:
        raise RecipeError(f"--key {key}: cannot be read: {e.strerror or e}") from e
    except Exception as e:  # whatever is no key, the package says in its own ways
        raise RecipeError(f"--key {key}: is no key that can be used: {_told(e)}") from e


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or f"the signature is not by this key ({type(error).__name__})"
