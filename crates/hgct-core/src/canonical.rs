//! Canonical encoding and content hashes: the same document is the same bytes everywhere.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{Error, Result};

/// SHA-256 of a document's canonical encoding or of a file's bytes, as lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash(String);

impl Hash {
    /// Hash of raw bytes.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self::from_digest(&Sha256::digest(bytes))
    }

    /// Wraps a finished SHA-256 digest.
    pub fn from_digest(digest: &[u8]) -> Self {
        use fmt::Write as _;
        let mut hex = String::with_capacity(64);
        for byte in digest {
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex)
    }

    /// Hash of a document's [`encode`]d form.
    pub fn of<T: Serialize>(document: &T) -> Self {
        Self::of_bytes(encode(document).as_bytes())
    }

    /// All 64 hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve digits, for people.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl TryFrom<String> for Hash {
    type Error = Error;
    fn try_from(hex: String) -> Result<Self> {
        if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(hex))
        } else {
            Err(Error::Name { what: "hash", found: hex, allowed: "64 lower-case hex digits" })
        }
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> String {
        hash.0
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Canonical JSON: keys in order of declaration (documents hold no unordered maps), two-space
/// indent, a final newline. Readable in a diff, and the input of every document hash.
pub fn encode<T: Serialize>(document: &T) -> String {
    // Documents hold only types that JSON can express; a failure is a programmer's error.
    match serde_json::to_string_pretty(document) {
        Ok(mut text) => {
            text.push('\n');
            text
        }
        Err(error) => panic!("a document does not encode as JSON: {error}"),
    }
}

/// Parses what [`encode`] wrote; `file` is only named in errors.
pub fn decode<T: for<'de> Deserialize<'de>>(file: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column, said) = (error.line(), error.column(), error.to_string());
        // The parser ends with the place, which stands before the message already.
        let message = match said.strip_suffix(&format!(" at line {line} column {column}")) {
            Some(message) => format!("{message} (column {column})"),
            None => said,
        };
        Error::Syntax { file: file.into(), line: (line > 0).then_some(line), message }
    })
}
