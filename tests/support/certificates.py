"""Certificates for tests, made with openssl."""

import subprocess
from pathlib import Path

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]


def certificate(folder: Path, name: str, signer: str = "") -> None:
    """``name``.pem and ``name``.key, signed by ``signer`` or by itself."""
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    signed = ["-CA", f"{signer}.pem", "-CAkey", f"{signer}.key"] if signer else []
    subprocess.run(
        ["openssl", "req", "-x509", *NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", *subject, *signed],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / f"{name}.key").chmod(0o600)
