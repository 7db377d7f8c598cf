//! Where text comes from: files, globs, folders and JSONL, read as documents in pieces.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};

use hgct_core::canonical::Hash;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::words::is_safe_cut;
use crate::{Error, Result};

/// Longest piece in bytes. A longer document is cut, preferably between two lines where the
/// byte-level pre-tokenizer cuts too, so that the tokens stay the same.
pub const PIECE_BYTES: usize = 64 << 10;

/// Longest line of a JSONL file in bytes; a longer one is an error, not an allocation.
pub const MAX_JSONL_LINE_BYTES: u64 = 256 << 20;

/// Text files in a fixed order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    files: Vec<SourceFile>,
}

/// One text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it lies.
    pub path: PathBuf,
    /// How it holds documents.
    pub format: SourceFormat,
    /// Named as itself: an empty file is then an error. One that a glob or folder brought is left
    /// out when it is empty.
    pub named: bool,
}

/// How a file holds documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceFormat {
    /// The whole file is one document.
    Text,
    /// Each line is an object whose `text` is one document (`.jsonl`, `.ndjson`).
    Jsonl,
}

/// What reading a whole file showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// Of the file's bytes.
    pub sha256: Hash,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of text in it.
    pub text_bytes: u64,
    /// Documents that are not empty.
    pub documents: u64,
}

/// A part of a document; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The text.
    pub text: &'a str,
    /// The document ends here.
    pub ends_document: bool,
}

impl Sources {
    /// Resolves what a job names, relative to `base`: a file; a folder (every file below it, hidden
    /// ones left out); or a glob. The order is that of `patterns`, sorted by path within each; a
    /// file that comes up twice counts once.
    pub fn resolve<S: AsRef<str>>(patterns: &[S], base: &Path) -> Result<Self> {
        let mut files = Vec::new();
        let mut seen = BTreeSet::new();
        for pattern in patterns {
            let pattern = pattern.as_ref();
            let before = files.len();
            let path = base.join(pattern);
            let mut known = false;
            let (found, named) = match fs::metadata(&path) {
                Ok(meta) if meta.is_dir() => (walk(&path)?, false),
                Ok(meta) if meta.is_file() => (vec![path], true),
                // Reading a pipe or a device might never end.
                Ok(_) => return Err(Error::io("read", &path)(io::Error::other("not a regular file"))),
                Err(_) => (glob(pattern, base)?, false),
            };
            for path in found {
                // Two ways to the same file are one file.
                let identity = fs::canonicalize(&path).map_err(Error::io("open", &path))?;
                if seen.insert(identity) {
                    files.push(SourceFile { format: SourceFormat::of(&path), path, named });
                } else {
                    known = true;
                }
            }
            if files.len() == before && !known {
                return Err(Error::NoMatch { pattern: pattern.into(), base: base.into() });
            }
        }
        if files.is_empty() {
            return Err(Error::Option {
                key: "data.paths",
                found: "empty".into(),
                allowed: "at least one path".into(),
            });
        }
        Ok(Self { files })
    }

    /// Sources with exactly these files, in this order, as if a glob had found them.
    pub fn from_files(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let files =
            paths.into_iter().map(|path| SourceFile { format: SourceFormat::of(&path), path, named: false });
        Self { files: files.collect() }
    }

    /// The files in order.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }
}

impl SourceFormat {
    /// By the file's name.
    pub fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "ndjson") => Self::Jsonl,
            _ => Self::Text,
        }
    }
}

impl SourceFile {
    /// Reads the whole file once, checks that it is text, and says what is in it.
    pub fn scan(&self) -> Result<Scan> {
        let (mut text_bytes, mut documents) = (0, 0);
        let (sha256, file_bytes) = self.read(&mut |piece| {
            text_bytes += piece.text.len() as u64;
            documents += u64::from(piece.ends_document);
            Ok(())
        })?;
        if self.named && documents == 0 {
            return Err(Error::Empty { path: self.path.clone() });
        }
        Ok(Scan { sha256, file_bytes, text_bytes, documents })
    }

    /// Hands every piece of every document to `sink`, in order; returns the hash and size of what
    /// was read.
    pub fn read(&self, sink: &mut dyn FnMut(Piece<'_>) -> Result<()>) -> Result<(Hash, u64)> {
        let file = File::open(&self.path).map_err(Error::io("open", &self.path))?;
        let mut file = Hashing { inner: file, sha256: Sha256::new(), bytes: 0 };
        match self.format {
            SourceFormat::Text => read_text(&self.path, &mut file, sink)?,
            SourceFormat::Jsonl => read_jsonl(&self.path, &mut file, sink)?,
        }
        Ok((Hash::from_digest(&file.sha256.finalize()), file.bytes))
    }
}

/// Hashes what passes through.
struct Hashing {
    inner: File,
    sha256: Sha256,
    bytes: u64,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.sha256.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

fn read_text(path: &Path, file: &mut impl Read, sink: &mut dyn FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
    let mut buffer: Vec<u8> = Vec::with_capacity(2 * PIECE_BYTES);
    let (mut lines, mut offset) = (0u64, 0u64);
    let mut ended = false;
    while !ended || !buffer.is_empty() {
        let missing = (2 * PIECE_BYTES - buffer.len()) as u64;
        let read = file.by_ref().take(missing).read_to_end(&mut buffer).map_err(Error::io("read", path))?;
        ended = (read as u64) < missing;
        if buffer.is_empty() {
            break;
        }
        let cut = if ended && buffer.len() <= PIECE_BYTES { buffer.len() } else { cut(&buffer) };
        let text = check_text(path, &buffer[..cut], lines, offset)?;
        let ends_document = ended && cut == buffer.len();
        sink(Piece { text, ends_document })?;
        lines += newlines(text.as_bytes());
        offset += cut as u64;
        buffer.drain(..cut);
    }
    Ok(())
}

fn read_jsonl(
    path: &Path,
    file: &mut impl Read,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<()>,
) -> Result<()> {
    /// Other keys are the user's.
    #[derive(Deserialize)]
    struct Row {
        text: String,
    }
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut row = Vec::new();
    let (mut line, mut offset) = (0u64, 0u64);
    loop {
        row.clear();
        let limit = MAX_JSONL_LINE_BYTES + 1;
        let read = file.by_ref().take(limit).read_until(b'\n', &mut row);
        if read.map_err(Error::io("read", path))? == 0 {
            return Ok(());
        }
        let at = |reason| Error::Jsonl { path: path.into(), line: line + 1, reason };
        if row.len() as u64 > MAX_JSONL_LINE_BYTES {
            return Err(at(format!("the line is longer than {MAX_JSONL_LINE_BYTES} bytes")));
        }
        let text = check_text(path, &row, line, offset)?;
        if !text.trim().is_empty() {
            let row: Row = serde_json::from_str(text).map_err(|error| at(describe(&error)))?;
            let mut rest = row.text.as_str();
            while !rest.is_empty() {
                let cut = if rest.len() <= PIECE_BYTES { rest.len() } else { cut(rest.as_bytes()) };
                let (text, after) = rest.split_at(cut);
                sink(Piece { text, ends_document: after.is_empty() })?;
                rest = after;
            }
        }
        line += 1;
        offset += row.len() as u64;
    }
}

/// The parser counts lines within the one line it sees; only its column means something.
fn describe(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let reason = message.rsplit_once(" at line ").map_or(message.as_str(), |(reason, _)| reason);
    format!("{reason} at column {}", error.column())
}

/// Where to end a piece of `text` that is longer than [`PIECE_BYTES`]: at the last line start
/// that is safe, else at the last line start, else before a character.
fn cut(text: &[u8]) -> usize {
    let window = &text[..text.len().min(PIECE_BYTES)];
    let starts = || (1..window.len()).rev().filter(|&at| window[at - 1] == b'\n');
    if let Some(at) = starts().find(|&at| is_safe_cut(window, at)) {
        return at;
    }
    if let Some(at) = starts().next() {
        return at;
    }
    let boundary = |at: &usize| text.get(*at).is_none_or(|byte| byte & 0xC0 != 0x80);
    // A run of continuation bytes is not UTF-8; whatever the cut, the check finds it.
    (window.len().saturating_sub(3)..=window.len()).rev().find(boundary).unwrap_or(window.len())
}

fn check_text<'a>(path: &Path, bytes: &'a [u8], lines: u64, offset: u64) -> Result<&'a str> {
    let bad = |at: usize, found| Error::NotText {
        path: path.into(),
        line: lines + newlines(&bytes[..at]) + 1,
        offset: offset + at as u64,
        found,
    };
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(bad(at, "a NUL byte (this looks like a binary file)"));
    }
    std::str::from_utf8(bytes).map_err(|error| bad(error.valid_up_to(), "a byte that is not UTF-8"))
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.split(|&byte| byte == b'\n').count() as u64 - 1
}

/// All files below `folder`, sorted by path. Hidden entries are left out, and links to folders are
/// not followed, so that no cycle can occur.
pub(crate) fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(Error::io("list", &folder))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &folder))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            let kind = entry.file_type().map_err(Error::io("look at", &path))?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() || (kind.is_symlink() && path.is_file()) {
                files.push(path);
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Files that `pattern` matches; `*` and `?` stay within one folder.
fn glob(pattern: &str, base: &Path) -> Result<Vec<PathBuf>> {
    // Only the folder before the first special character need be walked.
    let special = pattern.find(['*', '?', '[', '{']).unwrap_or(pattern.len());
    if special == pattern.len() {
        return Err(Error::NoMatch { pattern: pattern.into(), base: base.into() });
    }
    let fixed = pattern[..special].rfind('/').map_or("", |slash| &pattern[..=slash]);
    let matcher = globset::GlobBuilder::new(&pattern[fixed.len()..])
        .literal_separator(true)
        .build()
        .map_err(|error| Error::Glob { pattern: pattern.into(), reason: error.kind().to_string() })?
        .compile_matcher();
    let folder = base.join(fixed);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut files = walk(&folder)?;
    files.retain(|file| file.strip_prefix(&folder).is_ok_and(|below| matcher.is_match(below)));
    Ok(files)
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
