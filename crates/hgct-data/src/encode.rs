//! Documents to tokens, on a few threads, in the order of the text.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{panic, thread};

use crate::Result;
use crate::tokenizer::Tokenizer;
use crate::words;

/// Pieces a batch and thread: enough that a slow piece at the end costs little.
const PIECES_A_THREAD: usize = 32;

/// Words remembered at most; then it starts afresh.
const MOST_WORDS: usize = 1 << 18;

/// Longest word remembered, in bytes.
const MOST_WORD_BYTES: usize = 64;

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

/// A tokenizer that looks the tokens of a word up once; one a thread. The tokens are those of the
/// tokenizer itself; a property test compares them.
pub(crate) struct WordTokenizer {
    tokenizer: Tokenizer,
    words: HashMap<String, Vec<u32>>,
}

impl WordTokenizer {
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, words: HashMap::new() }
    }

    /// Tokens of `text`, as the tokenizer itself would give them.
    pub(crate) fn encode(&mut self, text: &str) -> Result<Vec<u32>> {
        if !self.tokenizer.is_plain_byte_level() {
            return self.tokenizer.encode(text);
        }
        let mut tokens = Vec::with_capacity(text.len() / 2);
        for part in words::parts(text) {
            if part.is_ascii() {
                for word in words::words(part) {
                    self.encode_word(word, &mut tokens)?;
                }
            } else {
                tokens.extend(self.tokenizer.encode(part)?);
            }
        }
        Ok(tokens)
    }

    pub(crate) fn end_of_text(&self) -> u32 {
        self.tokenizer.end_of_text()
    }

    fn encode_word(&mut self, word: &str, tokens: &mut Vec<u32>) -> Result<()> {
        if let Some(known) = self.words.get(word) {
            tokens.extend(known);
            return Ok(());
        }
        let new = self.tokenizer.encode(word)?;
        tokens.extend(&new);
        if word.len() <= MOST_WORD_BYTES {
            if self.words.len() >= MOST_WORDS {
                self.words.clear();
            }
            self.words.insert(word.to_owned(), new);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{byte_level_words, library_words};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static TRAINED: LazyLock<Tokenizer> = LazyLock::new(|| {
        let texts = [include_str!("source.rs"), include_str!("words.rs"), "日本語 naïve"];
        Tokenizer::train(500, texts.into_iter().map(str::to_owned)).unwrap()
    });

    fn agree(text: &str) {
        let mut short = WordTokenizer::new(TRAINED.clone());
        let expected = TRAINED.encode(text).unwrap();
        assert_eq!(short.encode(text).unwrap(), expected, "{text:?}");
        assert_eq!(short.encode(text).unwrap(), expected, "remembered: {text:?}");
        assert_eq!(byte_level_words(text).unwrap(), library_words(text).unwrap(), "{text:?}");
    }

    #[test]
    fn real_text_has_the_same_tokens_either_way() {
        assert!(TRAINED.is_plain_byte_level());
        for text in [
            include_str!("source.rs"),
            include_str!("prepare_tests.rs"),
            "it's  we'll 'tis\n\n\tx = 12ab;  \r\n \n<|endoftext|>\ny\u{1c}\u{b}\u{7f}é's\nz  ",
        ] {
            agree(text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_text_has_the_same_tokens_either_way(
            text in "[ \\n\\t\\rab1'stdrevml.,é\\x00-\\x7f]{0,80}|([ ab\\n']|x\n|é){0,60}|.{0,40}",
        ) {
            agree(&text);
        }
    }
}
