//! The token file: a fixed header, then tokens of one width, little-endian.
//!
//! | Bytes | Field |
//! | --- | --- |
//! | 0..8 | magic `HGCTTOK\0` |
//! | 8..12 | format, u32, 1 |
//! | 12..16 | bytes a token, u32, 2 or 4 |
//! | 16..20 | vocabulary size, u32 |
//! | 20..24 | end-of-text token, u32 |
//! | 24..32 | number of tokens, u64 |
//! | 32..64 | SHA-256 of the `tokenizer.json` |
//! | 64.. | the tokens |

use std::fs::File;
use std::path::{Path, PathBuf};

use hgct_core::canonical::Hash;
use memmap2::Mmap;

use crate::blocks::sha256_of;
use crate::{Error, Result};

/// Bytes before the first token.
pub const HEADER_BYTES: u64 = 64;
const MAGIC: &[u8; 8] = b"HGCTTOK\0";
const FORMAT: u32 = 1;

/// What the tokens of a file are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Width of a token in the file.
    pub width: Width,
    /// Every token is below this.
    pub vocab_size: u32,
    /// The token between documents.
    pub end_of_text: u32,
    /// Number of tokens.
    pub count: u64,
    /// Of the `tokenizer.json`.
    pub tokenizer_sha256: [u8; 32],
}

/// Width of a token in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// Two bytes, for vocabularies up to 65,536.
    U16,
    /// Four bytes.
    U32,
}

/// A validated, memory-mapped token file.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    header: Header,
    map: Mmap,
}

/// The samples of a file for one sequence length: sample `i` is `tokens[i·S .. i·S+S+1]`, of which
/// the first S are inputs and the last S, shifted by one, are labels.
#[derive(Debug, Clone, Copy)]
pub struct Samples<'a> {
    file: &'a TokenFile,
    seq_len: u64,
    len: u64,
}

impl Width {
    /// The narrowest that holds every token below `vocab_size`.
    pub fn for_vocab(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes a token.
    pub fn bytes(self) -> u64 {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

impl Header {
    /// Bytes of the whole file; `None` where they do not fit 64 bits.
    pub fn file_bytes(&self) -> Option<u64> {
        self.count.checked_mul(self.width.bytes())?.checked_add(HEADER_BYTES)
    }

    /// The header as it stands in the file.
    pub fn encode(&self) -> [u8; HEADER_BYTES as usize] {
        let mut bytes = [0; HEADER_BYTES as usize];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.width.bytes() as u32).to_le_bytes());
        bytes[16..20].copy_from_slice(&self.vocab_size.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.end_of_text.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.count.to_le_bytes());
        bytes[32..].copy_from_slice(&self.tokenizer_sha256);
        bytes
    }

    /// Parses and checks the first bytes of a file that is `file_bytes` long. The error says what
    /// was found and what was expected.
    pub fn decode(bytes: &[u8], file_bytes: u64) -> Result<Self, String> {
        let Some(bytes) = bytes.first_chunk::<{ HEADER_BYTES as usize }>() else {
            return Err(format!("{} bytes are less than a header of {HEADER_BYTES}", bytes.len()));
        };
        if &bytes[..8] != MAGIC {
            return Err("it does not start like a token file".into());
        }
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        if word(8) != FORMAT {
            return Err(format!("format {}, but this version reads {FORMAT}", word(8)));
        }
        let width = match word(12) {
            2 => Width::U16,
            4 => Width::U32,
            other => return Err(format!("{other} bytes a token, but only 2 and 4 are allowed")),
        };
        let (vocab_size, end_of_text) = (word(16), word(20));
        if width == Width::U16 && vocab_size > 1 << 16 {
            return Err(format!("a vocabulary of {vocab_size} does not fit 2 bytes a token"));
        }
        if end_of_text >= vocab_size {
            return Err(format!(
                "end-of-text token {end_of_text} is outside of the vocabulary of {vocab_size}"
            ));
        }
        let count = u64::from(word(24)) | u64::from(word(28)) << 32;
        let mut tokenizer_sha256 = [0; 32];
        tokenizer_sha256.copy_from_slice(&bytes[32..]);
        let header = Self { width, vocab_size, end_of_text, count, tokenizer_sha256 };
        match header.file_bytes() {
            Some(expected) if expected == file_bytes => Ok(header),
            Some(expected) => Err(format!("{file_bytes} bytes long, but {count} tokens take {expected}")),
            None => Err(format!("{count} tokens do not fit any file")),
        }
    }
}

impl TokenFile {
    /// Maps a file and checks its header and length, not its content: see [`Self::verify`] and
    /// [`Self::check_tokens`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let meta = file.metadata().map_err(Error::io("look at", path))?;
        let fail = |reason| Error::TokenFile { path: path.into(), reason };
        if !meta.is_file() {
            return Err(fail("not a regular file".into()));
        }
        if meta.len() < HEADER_BYTES {
            return Err(fail(format!("{} bytes are less than a header", meta.len())));
        }
        // SAFETY: the mapping is read-only and lives in `TokenFile`. Its bytes must not change
        // under it: token files are written under a temporary name, renamed once and never written
        // again, and their names carry their content.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let header = Header::decode(&map, map.len() as u64).map_err(fail)?;
        Ok(Self { path: path.into(), header, map })
    }

    /// Fails unless the file's SHA-256 is `expected`. Reads all of it.
    pub fn verify(&self, expected: &Hash) -> Result<()> {
        let found = sha256_of(&self.map);
        if &found == expected {
            return Ok(());
        }
        Err(Error::HashMismatch { path: self.path.clone(), expected: expected.clone(), found })
    }

    /// Fails where a token is outside of the vocabulary. Reads all of the file.
    pub fn check_tokens(&self) -> Result<()> {
        match self.iter().position(|token| token >= self.header.vocab_size) {
            None => Ok(()),
            Some(at) => Err(self.outside(at as u64)),
        }
    }

    /// The samples of `seq_len` tokens; an error where there is not even one.
    pub fn samples(&self, seq_len: u32) -> Result<Samples<'_>> {
        let seq_len = u64::from(seq_len);
        if seq_len == 0 {
            return Err(Error::Option { key: "seq_len", found: "0".into(), allowed: "at least 1".into() });
        }
        let len = self.header.count.saturating_sub(1) / seq_len;
        if len == 0 {
            return Err(Error::TooFewTokens {
                what: self.path.display().to_string(),
                tokens: self.header.count,
                needed: seq_len + 1,
            });
        }
        Ok(Samples { file: self, seq_len, len })
    }

    /// All tokens in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + DoubleEndedIterator + Clone + '_ {
        (0..self.header.count as usize).map(|at| self.token(at))
    }

    /// What the tokens are.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.header.count
    }

    /// True where there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.header.count == 0
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn token(&self, at: usize) -> u32 {
        match self.header.width {
            Width::U16 => {
                let at = HEADER_BYTES as usize + 2 * at;
                u32::from(u16::from_le_bytes([self.map[at], self.map[at + 1]]))
            }
            Width::U32 => {
                let at = HEADER_BYTES as usize + 4 * at;
                u32::from_le_bytes([0, 1, 2, 3].map(|i| self.map[at + i]))
            }
        }
    }

    fn outside(&self, at: u64) -> Error {
        let (token, vocab_size) = (self.token(at as usize), self.header.vocab_size);
        let reason = format!("token {at} is {token}, outside of the vocabulary of {vocab_size}");
        Error::TokenFile { path: self.path.clone(), reason }
    }
}

impl Samples<'_> {
    /// Number of samples, at least 1. Tokens after the last whole sample are not used.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens an input.
    pub fn seq_len(&self) -> u32 {
        self.seq_len as u32
    }

    /// Appends sample `index` to `inputs` and `labels`, `seq_len` tokens each. Every token is
    /// checked against the vocabulary: an engine may read past its embedding otherwise.
    pub fn append(&self, index: u64, inputs: &mut Vec<u32>, labels: &mut Vec<u32>) -> Result<()> {
        if index >= self.len {
            return Err(Error::Option {
                key: "sample",
                found: index.to_string(),
                allowed: format!("below {}", self.len),
            });
        }
        let start = index * self.seq_len;
        let window = start as usize..=(start + self.seq_len) as usize;
        for at in window.clone() {
            if self.file.token(at) >= self.file.header.vocab_size {
                return Err(self.file.outside(at as u64));
            }
        }
        inputs.extend(window.clone().map(|at| self.file.token(at)).take(self.seq_len as usize));
        labels.extend(window.map(|at| self.file.token(at)).skip(1));
        Ok(())
    }

    /// Sample `index` as (inputs, labels).
    pub fn get(&self, index: u64) -> Result<(Vec<u32>, Vec<u32>)> {
        let (mut inputs, mut labels) = (Vec::new(), Vec::new());
        self.append(index, &mut inputs, &mut labels)?;
        Ok((inputs, labels))
    }
}

/// `tokens` in `width`; the caller has checked that they fit.
pub(crate) fn encode_tokens(tokens: &[u32], width: Width) -> Vec<u8> {
    match width {
        Width::U16 => tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect(),
        Width::U32 => tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
#[path = "token_file_tests.rs"]
mod tests;
