//! A short way through the byte-level pre-tokenizer for ASCII text.
//!
//! The library follows the origin of every byte through each step, which costs ten times what the
//! words themselves cost. ASCII parts of a text are cut into words here, by the same rules (the
//! pattern of GPT-2's encoder), and the tokens of a word are looked up once. Other parts go through
//! the library. The tokens are the same; a property test compares them.

use std::collections::HashMap;

use crate::Result;
use crate::tokenizer::Tokenizer;

/// Words remembered at most; then it starts afresh.
const MOST_WORDS: usize = 1 << 18;

/// Longest word remembered, in bytes.
const MOST_WORD_BYTES: usize = 64;

/// A tokenizer that remembers words; one a thread.
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
        for part in parts(text) {
            if part.is_ascii() {
                for word in words(part) {
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

/// True where a text may be cut at byte `at` without changing its words: a line ends in a visible
/// character and the next one begins with one.
pub(crate) fn is_safe_cut(text: &[u8], at: usize) -> bool {
    at >= 2
        && text[at - 1] == b'\n'
        && text[at - 2].is_ascii_graphic()
        && text.get(at).is_some_and(u8::is_ascii_graphic)
}

/// Parts of `text` between safe cuts.
pub(crate) fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let bytes = rest.as_bytes();
        let cut = (1..bytes.len()).find(|&at| is_safe_cut(bytes, at)).unwrap_or(bytes.len());
        let (part, after) = rest.split_at(cut);
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}

/// Words of an ASCII text, which they make up without gaps.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (word, after) = rest.split_at(word_bytes(rest.as_bytes()));
        rest = after;
        (!word.is_empty()).then_some(word)
    })
}

/// `word` in the alphabet in which byte-level vocabularies write bytes.
pub(crate) fn visible(word: &str) -> String {
    let shown = |byte: u8| match byte {
        b'!'..=b'~' => char::from(byte),
        // The invisible ones follow each other from U+0100: 0..=32, then 127.
        0x7f => '\u{121}',
        _ => char::from_u32(0x100 + u32::from(byte)).unwrap_or_default(),
    };
    word.bytes().map(shown).collect()
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Class {
    Letter,
    Digit,
    Space,
    Other,
}

fn class(byte: u8) -> Class {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
        b'0'..=b'9' => Class::Digit,
        b'\t'..=b'\r' | b' ' => Class::Space,
        _ => Class::Other,
    }
}

/// Length of the first word: a contraction; letters, digits or others with one space before them;
/// or white space, of which the last character is left to a word that follows.
fn word_bytes(text: &[u8]) -> usize {
    let Some(&first) = text.first() else { return 0 };
    for contraction in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"] {
        if text.starts_with(contraction.as_bytes()) {
            return contraction.len();
        }
    }
    let start = usize::from(first == b' ');
    if let Some(kind) = text.get(start).map(|&byte| class(byte)).filter(|&k| k != Class::Space) {
        let run = text[start..].iter().take_while(|&&byte| class(byte) == kind).count();
        return start + run;
    }
    let run = text.iter().take_while(|&&byte| class(byte) == Class::Space).count();
    if run == text.len() || run == 1 { run } else { run - 1 }
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
