//! The words of the byte-level pre-tokenizer, for ASCII text.
//!
//! The library follows the origin of every byte through each step, which costs ten times what the
//! words themselves cost. ASCII parts of a text are cut into words here, by the same rules (the
//! pattern of GPT-2's encoder); other parts go through the library.

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
