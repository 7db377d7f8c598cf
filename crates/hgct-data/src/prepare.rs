//! Text to token files, once: the result lies in a cache under the hash of text and options.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use hgct_core::canonical::{self, Hash};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::blocks::sha256_file;
use crate::encode::Encoder;
use crate::source::{Piece, Scan, SourceFile, SourceFormat, Sources};
use crate::split::{complement, held_out};
use crate::storage::{Create, Output, Staging, create_file};
use crate::token_file::{Header, TokenFile, Width, encode_tokens};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Raised whenever the same text and options would give other tokens.
const FORMAT: u32 = 1;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TRAIN: &str = "train.tokens";
const HELD_OUT: &str = "held_out.tokens";
const META: &str = "meta.json";
/// All tokens before they are split; gone when the folder appears.
const ALL: &str = "all.tokens";

/// What to make of which text.
#[derive(Debug, Clone)]
pub struct Options {
    /// The text.
    pub sources: Sources,
    /// How it becomes tokens.
    pub tokenizer: TokenizerChoice,
    /// Share of the tokens to hold out, 0 to 0.5.
    pub held_out: f64,
    /// Bytes of text to use at most, taken evenly over the sources.
    pub max_bytes: Option<u64>,
    /// Threads that encode; without influence on the result.
    pub threads: usize,
    /// Where results are kept.
    pub cache: PathBuf,
}

/// How text becomes tokens.
#[derive(Debug, Clone)]
pub enum TokenizerChoice {
    /// A `tokenizer.json`.
    Given {
        /// The file.
        path: PathBuf,
        /// Name of the token that separates documents; `None` looks for a usual one.
        end_of_text: Option<String>,
    },
    /// A byte-level BPE trained on the text.
    Train {
        /// Tokens, the end-of-text token included; fewer come out where the text is short.
        vocab_size: u32,
        /// Bytes of text to train on at most, taken evenly over the sources.
        train_bytes: u64,
    },
}

/// What is being done, for a line that a person reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// Bytes of text done in this phase.
    pub done: u64,
    /// Bytes of text in this phase; 0 where it is not known yet.
    pub total: u64,
}

/// Phases of [`prepare`], in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading, checking and hashing the sources.
    Scan,
    /// Training the tokenizer.
    TrainTokenizer,
    /// Encoding.
    Encode,
}

/// Prepared text: a folder with tokenizer, token files and `meta.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The folder.
    pub folder: PathBuf,
    /// It was there already.
    pub reused: bool,
    /// What is in it.
    pub meta: Meta,
}

/// `meta.json`: what is in the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Hash of text and options.
    pub key: Hash,
    /// `tokenizer.json`.
    pub tokenizer: FileMeta,
    /// The token file to train on.
    pub train: FileMeta,
    /// The held-out token file.
    pub held_out: FileMeta,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out.
    pub held_out_tokens: u64,
    /// Largest token plus one.
    pub vocab_size: u32,
    /// The token between documents.
    pub end_of_text: u32,
    /// Files that held text.
    pub source_files: u64,
    /// Files of globs and folders that were empty and left out.
    pub empty_files: u64,
    /// Documents in the sources.
    pub documents: u64,
    /// Bytes of text in the sources.
    pub text_bytes: u64,
    /// Bytes of text that were encoded.
    pub used_bytes: u64,
}

/// One file of the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMeta {
    /// Its SHA-256.
    pub sha256: Hash,
    /// Its length in bytes.
    pub bytes: u64,
}

impl Prepared {
    /// The `tokenizer.json`; a `tokenizer_config.json` for Hugging Face lies beside it.
    pub fn tokenizer_path(&self) -> PathBuf {
        self.folder.join(TOKENIZER)
    }

    /// The token file to train on.
    pub fn train_path(&self) -> PathBuf {
        self.folder.join(TRAIN)
    }

    /// The held-out token file; without tokens where nothing was to be held out.
    pub fn held_out_path(&self) -> PathBuf {
        self.folder.join(HELD_OUT)
    }

    /// Reads a folder and checks every file against its hash.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(META);
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let meta: Meta = serde_json::from_str(&text)
            .map_err(|error| Error::TokenFile { path, reason: error.to_string() })?;
        let prepared = Self { folder: folder.into(), reused: true, meta };
        let meta = &prepared.meta;
        for (path, file) in [
            (prepared.tokenizer_path(), &meta.tokenizer),
            (prepared.train_path(), &meta.train),
            (prepared.held_out_path(), &meta.held_out),
        ] {
            let (found, _) = sha256_file(&path)?;
            if found != file.sha256 {
                let expected = file.sha256.clone();
                return Err(Error::HashMismatch { path, expected, found });
            }
        }
        TokenFile::open(&prepared.train_path())?;
        TokenFile::open(&prepared.held_out_path())?;
        Ok(prepared)
    }
}

/// Makes tokenizer and token files of `options`, or finds them in the cache. The result depends on
/// the content of the sources (not on their names, dates or places) and on the options alone. What
/// is in the cache is verified; a damaged entry is made anew. A failure, a full disk included,
/// leaves the cache as it was.
pub fn prepare(options: &Options, progress: &mut dyn FnMut(Progress)) -> Result<Prepared> {
    prepare_with(options, progress, &create_file)
}

fn prepare_with(
    options: &Options,
    progress: &mut dyn FnMut(Progress),
    create: Create<'_>,
) -> Result<Prepared> {
    // Before minutes of work.
    held_out(0, options.held_out)?;
    let given = match &options.tokenizer {
        TokenizerChoice::Given { path, end_of_text } => Some(Tokenizer::open(path, end_of_text.as_deref())?),
        TokenizerChoice::Train { .. } => None,
    };
    let text = Text::scan(options, progress)?;
    let key = text.key(options, given.as_ref());
    let folder = options.cache.join(&key.as_str()[..32]);
    if folder.is_dir() {
        match Prepared::open(&folder) {
            Ok(prepared) if prepared.meta.key == key => return Ok(prepared),
            _ => fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?,
        }
    }
    let staging = Staging::begin(&options.cache, create)?;
    let tokenizer = match (given, &options.tokenizer) {
        (None, TokenizerChoice::Train { vocab_size, train_bytes }) => {
            text.train_tokenizer(*vocab_size, *train_bytes, progress)?
        }
        (Some(tokenizer), _) => tokenizer,
        (None, TokenizerChoice::Given { path, end_of_text }) => {
            Tokenizer::open(path, end_of_text.as_deref())?
        }
    };
    let tokens = encode(&text, &tokenizer, options.threads, &staging, progress)?;
    let meta = write_folder(key, &text, &tokenizer, tokens, options.held_out, &staging)?;
    staging.commit(&folder)?;
    Ok(Prepared { folder, reused: false, meta })
}

/// The scanned sources.
struct Text<'a> {
    files: Vec<(&'a SourceFile, Scan)>,
    empty_files: u64,
    bytes: u64,
    used_bytes: u64,
}

impl<'a> Text<'a> {
    fn scan(options: &'a Options, progress: &mut dyn FnMut(Progress)) -> Result<Self> {
        let mut text = Self { files: Vec::new(), empty_files: 0, bytes: 0, used_bytes: 0 };
        for file in options.sources.files() {
            let scan = file.scan()?;
            if scan.documents == 0 {
                text.empty_files += 1;
                continue;
            }
            text.bytes += scan.text_bytes;
            text.files.push((file, scan));
            progress(Progress { phase: Phase::Scan, done: text.bytes, total: 0 });
        }
        text.used_bytes = options.max_bytes.map_or(text.bytes, |most| most.min(text.bytes));
        if text.used_bytes == 0 {
            let what = "the text of the data paths".into();
            return Err(Error::TooFewTokens { what, tokens: 0, needed: 2 });
        }
        Ok(text)
    }

    fn key(&self, options: &Options, given: Option<&Tokenizer>) -> Hash {
        #[derive(Serialize)]
        struct Key<'a> {
            format: u32,
            given: Option<(Hash, u32)>,
            train: Option<(u32, u64)>,
            held_out: f64,
            used_bytes: u64,
            files: Vec<(&'a Hash, SourceFormat)>,
        }
        Hash::of(&Key {
            format: FORMAT,
            given: given.map(|tokenizer| (tokenizer.hash(), tokenizer.end_of_text())),
            train: match options.tokenizer {
                TokenizerChoice::Train { vocab_size, train_bytes } => Some((vocab_size, train_bytes)),
                TokenizerChoice::Given { .. } => None,
            },
            held_out: options.held_out,
            used_bytes: self.used_bytes,
            files: self.files.iter().map(|(file, scan)| (&scan.sha256, file.format)).collect(),
        })
    }

    /// Hands over every piece that is used, in order. Where one is left out within a document, the
    /// document ends before it.
    fn pieces(&self, sink: &mut dyn FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
        let mut share = Share::new(self.used_bytes, self.bytes);
        for (file, scan) in &self.files {
            let mut open = false;
            let (sha256, _) = file.read(&mut |piece| {
                let text = share.take(piece.text);
                let whole = text.len() == piece.text.len();
                if text.is_empty() {
                    // An empty piece only ends the document.
                    let end = Piece { text, ends_document: true };
                    return if std::mem::take(&mut open) { sink(end) } else { Ok(()) };
                }
                open = whole && !piece.ends_document;
                sink(Piece { text, ends_document: !open })
            })?;
            if sha256 != scan.sha256 {
                return Err(Error::Changed { path: file.path.clone() });
            }
        }
        Ok(())
    }

    fn train_tokenizer(
        &self,
        vocab_size: u32,
        train_bytes: u64,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Tokenizer> {
        let total = train_bytes.min(self.used_bytes);
        progress(Progress { phase: Phase::TrainTokenizer, done: 0, total });
        let mut share = Share::new(total, self.used_bytes);
        let mut texts = Vec::new();
        self.pieces(&mut |piece| {
            let text = share.take(piece.text);
            if !text.is_empty() {
                texts.push(text.to_owned());
            }
            Ok(())
        })?;
        let tokenizer = Tokenizer::train(vocab_size, texts.into_iter())?;
        progress(Progress { phase: Phase::TrainTokenizer, done: total, total });
        Ok(tokenizer)
    }
}

/// Takes `most` of `total` bytes, evenly.
struct Share {
    most: u64,
    total: u64,
    seen: u64,
    taken: u64,
}

impl Share {
    fn new(most: u64, total: u64) -> Self {
        Self { most, total, seen: 0, taken: 0 }
    }

    /// The part of the next piece that is taken: all, nothing or, at the very end, its start.
    fn take<'t>(&mut self, text: &'t str) -> &'t str {
        self.seen += text.len() as u64;
        let due = u128::from(self.most) * u128::from(self.seen);
        if u128::from(self.taken) * u128::from(self.total) >= due {
            return "";
        }
        let room = usize::try_from(self.most - self.taken).unwrap_or(usize::MAX);
        let text = &text[..text.floor_char_boundary(room)];
        self.taken += text.len() as u64;
        text
    }
}

/// Encodes all text into one unsplit file; returns the number of tokens.
fn encode(
    text: &Text<'_>,
    tokenizer: &Tokenizer,
    threads: usize,
    staging: &Staging<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<u64> {
    let width = Width::for_vocab(tokenizer.vocab_size());
    let mut encoder = Encoder::new(tokenizer, threads);
    let (mut tokens, mut done, total) = (0, 0, text.used_bytes);
    let mut flush = |encoder: &mut Encoder, out: &mut Output| -> Result<()> {
        let batch = encoder.flush()?;
        tokens += batch.len() as u64;
        out.put(&encode_tokens(&batch, width))
    };
    staging.write(ALL, &mut |out| {
        text.pieces(&mut |piece| {
            encoder.push(piece.text, piece.ends_document);
            done += piece.text.len() as u64;
            if encoder.is_full() {
                flush(&mut encoder, out)?;
                progress(Progress { phase: Phase::Encode, done, total });
            }
            Ok(())
        })?;
        flush(&mut encoder, out)?;
        progress(Progress { phase: Phase::Encode, done, total });
        Ok(())
    })?;
    Ok(tokens)
}

/// Splits the tokens and writes everything that the folder holds.
fn write_folder(
    key: Hash,
    text: &Text<'_>,
    tokenizer: &Tokenizer,
    tokens: u64,
    share: f64,
    staging: &Staging<'_>,
) -> Result<Meta> {
    let held = held_out(tokens, share)?;
    let train = complement(tokens, &held);
    let count = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum();
    let (train_tokens, held_out_tokens) = (count(&train), count(&held));
    if train_tokens < 2 {
        let what = "the text of the data paths".into();
        return Err(Error::TooFewTokens { what, tokens: train_tokens, needed: 2 });
    }
    let header = |count| Header {
        width: Width::for_vocab(tokenizer.vocab_size()),
        vocab_size: tokenizer.vocab_size(),
        end_of_text: tokenizer.end_of_text(),
        count,
        tokenizer_sha256: Sha256::digest(tokenizer.json()).into(),
    };
    copy_tokens(staging, TRAIN, &header(train_tokens), &train)?;
    copy_tokens(staging, HELD_OUT, &header(held_out_tokens), &held)?;
    staging.remove(ALL)?;
    staging.write(TOKENIZER, &mut |out| out.put(tokenizer.json()))?;
    let config = tokenizer.config_json();
    staging.write(TOKENIZER_CONFIG, &mut |out| out.put(config.as_bytes()))?;
    let file = |name: &str| -> Result<FileMeta> {
        let (sha256, bytes) = sha256_file(&staging.path(name))?;
        Ok(FileMeta { sha256, bytes })
    };
    let meta = Meta {
        key,
        tokenizer: file(TOKENIZER)?,
        train: file(TRAIN)?,
        held_out: file(HELD_OUT)?,
        train_tokens,
        held_out_tokens,
        vocab_size: tokenizer.vocab_size(),
        end_of_text: tokenizer.end_of_text(),
        source_files: text.files.len() as u64,
        empty_files: text.empty_files,
        documents: text.files.iter().map(|(_, scan)| scan.documents).sum(),
        text_bytes: text.bytes,
        used_bytes: text.used_bytes,
    };
    let json = canonical::encode(&meta);
    staging.write(META, &mut |out| out.put(json.as_bytes()))?;
    Ok(meta)
}

/// Writes a token file with the tokens of `ranges` of the unsplit file.
fn copy_tokens(staging: &Staging<'_>, name: &str, header: &Header, ranges: &[Range<u64>]) -> Result<()> {
    let path = staging.path(ALL);
    let all = File::open(&path).map_err(Error::io("open", &path))?;
    let width = header.width.bytes();
    let mut buffer = vec![0; 1 << 20];
    staging.write(name, &mut |out| {
        out.put(&header.encode())?;
        for range in ranges {
            let (mut at, end) = (range.start * width, range.end * width);
            while at < end {
                let chunk = &mut buffer[..(end - at).min(1 << 20) as usize];
                all.read_exact_at(chunk, at).map_err(Error::io("read", &path))?;
                out.put(chunk)?;
                at += chunk.len() as u64;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;
