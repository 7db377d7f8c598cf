//! A given `tokenizer.json`, or a byte-level BPE trained on the text.

use std::fs;
use std::path::{Path, PathBuf};

use hgct_core::canonical::Hash;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, Trainer as _,
};

use crate::{Error, Result, words};

/// The token that separates documents in a vocabulary trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Smallest vocabulary of a byte-level BPE: the bytes, the end-of-text token and one merge.
pub const LEAST_VOCABULARY: u32 = 258;

/// Names under which published tokenizers hold their end-of-text token, the most specific first.
const KNOWN_END_OF_TEXT: &[&str] =
    &[END_OF_TEXT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|im_end|>"];

/// Tokenizer with its end-of-text token. Special tokens inside a text are ordinary text.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: Vec<u8>,
    path: PathBuf,
    end_of_text: u32,
    end_of_text_name: String,
    vocab_size: u32,
    plain_byte_level: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. `end_of_text` names the separator; `None` looks for one of the
    /// usual names.
    pub fn open(path: &Path, end_of_text: Option<&str>) -> Result<Self> {
        let json = fs::read(path).map_err(Error::io("read", path))?;
        Self::from_json(path, json, end_of_text)
    }

    /// Parses the content of a `tokenizer.json`; `path` is named in errors.
    pub fn from_json(path: &Path, json: Vec<u8>, end_of_text: Option<&str>) -> Result<Self> {
        quiet();
        let fail = |reason: String| Error::Tokenizer { path: path.into(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(&json)
            .map_err(|error| fail(format!("not a tokenizer.json: {error}")))?;
        // A text about tokenizers names special tokens; they must not act as such.
        inner.set_encode_special_tokens(true);
        // Neither belongs to a stream of tokens, and both would silently lose or invent some.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        let names: Vec<&str> = end_of_text.map_or_else(|| KNOWN_END_OF_TEXT.to_vec(), |n| vec![n]);
        let found = names.iter().find_map(|name| Some((*name, inner.token_to_id(name)?)));
        let Some((name, end_of_text)) = found else {
            return Err(fail(format!(
                "no end-of-text token named {}: name the token that separates documents",
                names.join(" or ")
            )));
        };
        let name = name.to_owned();
        // Some vocabularies have holes, so the largest id counts, not the number of tokens.
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab_size = largest
            .checked_add(1)
            .ok_or_else(|| fail(format!("token id {largest} is the largest of 32 bits")))?;
        let plain_byte_level = is_plain_byte_level(&json);
        let path = path.into();
        let end_of_text_name = name;
        Ok(Self { inner, json, path, end_of_text, end_of_text_name, vocab_size, plain_byte_level })
    }

    /// Trains a byte-level BPE of `vocab_size` tokens on `texts`. The same texts in the same order
    /// give the same bytes. One thread; a few seconds for 8 MB.
    pub fn train(vocab_size: u32, texts: impl Iterator<Item = String> + Send) -> Result<Self> {
        quiet();
        if vocab_size < LEAST_VOCABULARY {
            return Err(Error::Option {
                key: "vocab_size",
                found: vocab_size.to_string(),
                allowed: format!("at least {LEAST_VOCABULARY} for a byte-level BPE"),
            });
        }
        let path = PathBuf::from("being trained");
        let fail =
            |error: tokenizers::Error| Error::Tokenizer { path: path.clone(), reason: error.to_string() };
        let end_of_text = AddedToken::from(END_OF_TEXT, true).normalized(false);
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size as usize)
            .min_frequency(2)
            .special_tokens(vec![end_of_text.clone()])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        trainer.feed(texts, byte_level_words).map_err(fail)?;
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(fail)?;
        let mut inner = tokenizers::Tokenizer::new(model);
        let byte_level = byte_level();
        inner.with_pre_tokenizer(Some(byte_level));
        inner.with_decoder(Some(byte_level));
        inner.with_post_processor(Some(byte_level));
        inner.add_special_tokens(&[end_of_text]);
        let json = inner.to_string(true).map_err(fail)?.into_bytes();
        // Through the text, so that what is used is what is saved.
        Self::from_json(&path, json, Some(END_OF_TEXT))
    }

    /// Tokens of `text`, without any that a template would add.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| self.fail(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`, special ones included.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, false).map_err(|error| self.fail(&error))
    }

    /// Largest token plus one: what a model's embedding must at least have.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The token between documents.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The name of the token between documents.
    pub fn end_of_text_name(&self) -> &str {
        &self.end_of_text_name
    }

    /// True where the tokens of a text are those of its byte-level words, one word after another.
    pub(crate) fn is_plain_byte_level(&self) -> bool {
        self.plain_byte_level
    }

    /// Content of the `tokenizer.json`.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// Hash of the `tokenizer.json`.
    pub fn hash(&self) -> Hash {
        Hash::of_bytes(&self.json)
    }

    /// Content of the `tokenizer_config.json` with which Hugging Face's `AutoTokenizer` loads the
    /// folder.
    pub fn config_json(&self) -> String {
        let config = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_of_text_name,
            "clean_up_tokenization_spaces": false,
        });
        format!("{config:#}\n")
    }

    fn fail(&self, error: &tokenizers::Error) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason: error.to_string() }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .field("end_of_text", &self.end_of_text)
            .finish_non_exhaustive()
    }
}

fn byte_level() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// The byte-level words of `text`, in the alphabet in which vocabularies write them.
pub(crate) fn byte_level_words(text: &str) -> tokenizers::Result<Vec<String>> {
    let mut all = Vec::new();
    for part in words::parts(text) {
        if part.is_ascii() {
            all.extend(words::words(part).map(words::visible));
        } else {
            all.extend(library_words(part)?);
        }
    }
    Ok(all)
}

/// The same by the library alone.
pub(crate) fn library_words(text: &str) -> tokenizers::Result<Vec<String>> {
    let mut text = PreTokenizedString::from(text);
    byte_level().pre_tokenize(&mut text)?;
    let words = text.get_splits(OffsetReferential::Original, OffsetType::None);
    Ok(words.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

/// No normalizer, no prefix, no dropout, and no added token but special ones.
fn is_plain_byte_level(json: &[u8]) -> bool {
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(json) else { return false };
    let pre = &json["pre_tokenizer"];
    let added = json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    json["normalizer"].is_null()
        && pre["type"] == "ByteLevel"
        && pre["add_prefix_space"] == false
        && pre["use_regex"] == true
        && json["model"]["type"] == "BPE"
        && json["model"]["dropout"].is_null()
        && added.iter().all(|token| token["special"] == true)
}

/// The library would start a thread pool as wide as the machine; the threads are ours to count.
fn quiet() {
    tokenizers::utils::parallelism::set_parallelism(false);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static TRAINED: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::train(400, texts()).unwrap());

    fn texts() -> impl Iterator<Item = String> + Send {
        [include_str!("source.rs"), include_str!("error.rs"), "naïve – 日本語 \u{1F600}\r\n\t x"]
            .into_iter()
            .flat_map(|text| text.split_inclusive('\n').map(str::to_owned))
    }

    #[test]
    fn training_twice_gives_the_same_bytes() {
        assert_eq!(Tokenizer::train(400, texts()).unwrap().json(), TRAINED.json());
        assert_eq!(TRAINED.vocab_size(), 400);
    }

    #[test]
    fn real_text_comes_back() {
        for text in [include_str!("token_file.rs"), "<|endoftext|> is text here", "\u{0}\u{7f}"] {
            let tokens = TRAINED.encode(text).unwrap();
            assert_eq!(TRAINED.decode(&tokens).unwrap(), text);
            assert!(!tokens.contains(&TRAINED.end_of_text()));
        }
    }

    #[test]
    fn the_saved_tokenizer_is_the_used_one() {
        let again = Tokenizer::from_json(Path::new("t"), TRAINED.json().to_vec(), None).unwrap();
        assert_eq!(again.end_of_text(), TRAINED.end_of_text());
        assert_eq!(again.hash(), TRAINED.hash());
        let text = include_str!("error.rs");
        assert_eq!(again.encode(text).unwrap(), TRAINED.encode(text).unwrap());
    }

    #[test]
    fn a_tokenizer_without_end_of_text_is_refused_by_name() {
        let json = TRAINED.json().to_vec();
        let error = Tokenizer::from_json(Path::new("t.json"), json, Some("<none>")).unwrap_err();
        assert!(error.to_string().contains("t.json: no end-of-text token named <none>"), "{error}");
        let error = Tokenizer::from_json(Path::new("t.json"), b"{}".to_vec(), None).unwrap_err();
        assert!(error.to_string().contains("not a tokenizer.json"), "{error}");
        assert!(matches!(Tokenizer::train(10, texts()), Err(Error::Option { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_text_comes_back(text in "\\PC{0,40}|[ \\t\\r\\na-z<|>]{0,60}|.{0,40}") {
            let tokens = TRAINED.encode(&text).unwrap();
            prop_assert_eq!(TRAINED.decode(&tokens).unwrap(), text);
        }
    }
}
