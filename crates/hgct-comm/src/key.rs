//! The key of a run and the proofs made with it.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use hgct_core::ids::RunId;

/// The secret that the workers of one run share, derived from token and run id. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct RunKey(pub [u8; 32]);

impl fmt::Debug for RunKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RunKey(…)")
    }
}

impl RunKey {
    /// Derives the key of a run: HMAC-SHA256 of the run id under the token.
    pub fn derive(token: &[u8], run: &RunId) -> Self {
        Self(finish(mac_over(token, &[b"hgct run key", run.as_str().as_bytes()])))
    }

    /// The proof over the parts. Every part but the last has a fixed length, so that no two lists of
    /// parts read the same.
    pub(crate) fn proof(&self, parts: &[&[u8]]) -> [u8; 32] {
        finish(mac_over(&self.0, parts))
    }

    /// Checks a proof in constant time.
    pub(crate) fn verify(&self, parts: &[&[u8]], proof: &[u8]) -> bool {
        mac_over(&self.0, parts).verify_slice(proof).is_ok()
    }
}

fn mac_over(key: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = match Hmac::<Sha256>::new_from_slice(key) {
        Ok(mac) => mac,
        Err(error) => unreachable!("HMAC takes keys of any length: {error}"),
    };
    for part in parts {
        mac.update(part);
    }
    mac
}

fn finish(mac: Hmac<Sha256>) -> [u8; 32] {
    mac.finalize().into_bytes().into()
}

/// The digest under which a run is named on the wire.
pub(crate) fn run_digest(run: &RunId) -> [u8; 32] {
    Sha256::digest(run.as_str().as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_token_and_run_and_are_not_printed() {
        let run = |name: &str| RunId::new(name).unwrap();
        let key = RunKey::derive(b"token", &run("a"));
        assert_ne!(key, RunKey::derive(b"token", &run("b")));
        assert_ne!(key, RunKey::derive(b"Token", &run("a")));
        assert_eq!(key, RunKey::derive(b"token", &run("a")));
        assert_eq!(format!("{key:?}"), "RunKey(…)");
    }

    #[test]
    fn the_proof_is_hmac_sha256() {
        // RFC 4231, test case 2 (a key shorter than the block).
        let mac = finish(mac_over(b"Jefe", &[b"what do ya want ", b"for nothing?"]));
        let expected = [
            0x5b, 0xdc, 0xc1, 0x46, 0xbf, 0x60, 0x75, 0x4e, 0x6a, 0x04, 0x24, 0x26, 0x08, 0x95, 0x75, 0xc7,
            0x5a, 0x00, 0x3f, 0x08, 0x9d, 0x27, 0x39, 0x83, 0x9d, 0xec, 0x58, 0xb9, 0x64, 0xec, 0x38, 0x43,
        ];
        assert_eq!(mac, expected);
    }
}
