//! From text to samples: sources, tokenizer, token files, held-out split.
//!
//! [`prepare()`] turns [`Sources`] into a tokenizer and two memory-mapped [`TokenFile`]s, one to
//! train on and one held out, in a cache addressed by the content of the text and the options. It
//! holds hundreds of megabytes of tokenizer state for a while, so the command runs it (and
//! [`ngram`]) in a child process. Workers only ever open the token files.
//!
//! | Module | Holds |
//! | --- | --- |
//! | [`source`] | text files, globs, folders, JSONL; documents read piece by piece |
//! | [`registry`] | Rust crate sources as a text that every build machine has |
//! | [`tokenizer`] | a given `tokenizer.json`, or a byte-level BPE trained on the text |
//! | [`token_file`] | the token file's format, reader and samples |
//! | [`split`] | which tokens are held out |
//! | [`mod@prepare`] | all of it at once, cached and atomic |
//! | [`blocks`] | a file by content hash, cut for the wire and put together again |
//! | [`ngram`] | unigram and bigram baselines in nats a token |

pub mod blocks;
mod encode;
mod error;
pub mod ngram;
pub mod prepare;
pub mod registry;
pub mod source;
pub mod split;
mod storage;
pub mod token_file;
pub mod tokenizer;
mod words;

pub use error::{Error, Result};
pub use prepare::{Options, Prepared, Progress, TokenizerChoice, prepare};
pub use source::Sources;
pub use token_file::TokenFile;
