//! Documents to tokens, on a few threads, in the order of the text.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::{panic, thread};

use crate::Result;
use crate::tokenizer::Tokenizer;
use crate::words::WordTokenizer;

/// Pieces a batch and thread: enough that a slow piece at the end costs little.
const PIECES_A_THREAD: usize = 32;

/// Collects pieces and encodes them a batch at a time; the result does not depend on the threads.
pub(crate) struct Encoder {
    /// One a thread, with the words that it has seen.
    copies: Vec<WordTokenizer>,
    pieces: Vec<(String, bool)>,
}

impl Encoder {
    /// An encoder on `threads` threads (at least one).
    pub(crate) fn new(tokenizer: &Tokenizer, threads: usize) -> Self {
        Self {
            copies: (0..threads.max(1)).map(|_| WordTokenizer::new(tokenizer.clone())).collect(),
            pieces: Vec::new(),
        }
    }

    /// Takes a piece; an end-of-text token follows it where `ends_document`.
    pub(crate) fn push(&mut self, text: &str, ends_document: bool) {
        self.pieces.push((text.to_owned(), ends_document));
    }

    /// True where a batch is full.
    pub(crate) fn is_full(&self) -> bool {
        self.pieces.len() >= PIECES_A_THREAD * self.copies.len()
    }

    /// Encodes what was taken, and forgets it; the tokens in the order of the text.
    pub(crate) fn flush(&mut self) -> Result<Vec<u32>> {
        let next = AtomicUsize::new(0);
        let pieces = &self.pieces;
        let work = |tokenizer: &mut WordTokenizer| -> Result<Vec<(usize, Vec<u32>)>> {
            let mut encoded = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((text, ends_document)) = pieces.get(index) else { return Ok(encoded) };
                let mut tokens = tokenizer.encode(text)?;
                tokens.extend(ends_document.then(|| tokenizer.end_of_text()));
                encoded.push((index, tokens));
            }
        };
        let shares: Result<Vec<_>> = thread::scope(|scope| {
            let threads: Vec<_> = self.copies.iter_mut().map(|copy| scope.spawn(|| work(copy))).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
            };
            threads.into_iter().map(join).collect()
        });
        let mut encoded = shares?.concat();
        encoded.sort_unstable_by_key(|(index, _)| *index);
        self.pieces.clear();
        Ok(encoded.into_iter().flat_map(|(_, tokens)| tokens).collect())
    }
}
