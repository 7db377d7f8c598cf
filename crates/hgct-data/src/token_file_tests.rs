use super::*;
use proptest::prelude::*;
use std::fs;

fn header(tokens: &[u32], vocab_size: u32) -> Header {
    Header {
        width: Width::for_vocab(vocab_size),
        vocab_size,
        end_of_text: 0,
        count: tokens.len() as u64,
        tokenizer_sha256: [7; 32],
    }
}

fn bytes(tokens: &[u32], vocab_size: u32) -> Vec<u8> {
    let header = header(tokens, vocab_size);
    [&header.encode()[..], &encode_tokens(tokens, header.width)].concat()
}

fn with_file<T>(content: &[u8], look: impl FnOnce(Result<TokenFile>) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.tokens");
    fs::write(&path, content).unwrap();
    look(TokenFile::open(&path))
}

#[test]
fn samples_are_windows_with_shifted_labels() {
    for vocab_size in [100, 70_000] {
        let tokens: Vec<u32> = (10..20).collect();
        with_file(&bytes(&tokens, vocab_size), |file| {
            let file = file.unwrap();
            assert_eq!(file.iter().collect::<Vec<_>>(), tokens);
            let samples = file.samples(3).unwrap();
            assert_eq!(samples.len(), 3);
            assert_eq!(samples.get(0).unwrap(), (vec![10, 11, 12], vec![11, 12, 13]));
            assert_eq!(samples.get(2).unwrap(), (vec![16, 17, 18], vec![17, 18, 19]));
            assert!(matches!(samples.get(3), Err(Error::Option { key: "sample", .. })));
            assert_eq!(file.samples(9).unwrap().len(), 1);
            assert!(matches!(file.samples(10), Err(Error::TooFewTokens { needed: 11, .. })));
            assert!(matches!(file.samples(0), Err(Error::Option { .. })));
        });
    }
}

#[test]
fn the_format_is_what_the_table_says() {
    let bytes = bytes(&[1, 258], 300);
    assert_eq!(&bytes[..8], b"HGCTTOK\0");
    assert_eq!(bytes[8..24], [1, 0, 0, 0, 2, 0, 0, 0, 44, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[24..32], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[32..], [&[7; 32][..], &[1, 0, 2, 1]].concat());
}

#[test]
fn damage_is_told_apart() {
    let good = bytes(&[1, 2, 3], 300);
    let with = |at: usize, value: u8| {
        let mut bad = good.clone();
        bad[at] = value;
        bad
    };
    for (content, reason) in [
        (vec![], "0 bytes are less than a header"),
        (good[..63].to_vec(), "63 bytes are less than a header"),
        (good[..69].to_vec(), "69 bytes long, but 3 tokens take 70"),
        ([&good[..], b"x"].concat(), "71 bytes long, but 3 tokens take 70"),
        (with(0, b'x'), "does not start like a token file"),
        (with(8, 9), "format 9"),
        (with(12, 3), "3 bytes a token"),
        (with(18, 9), "does not fit 2 bytes"),
        (with(21, 9), "end-of-text token 2304 is outside"),
        (with(31, 255), "do not fit any file"),
    ] {
        let error = with_file(&content, |file| file.unwrap_err());
        let message = error.to_string();
        assert!(matches!(error, Error::TokenFile { .. }), "{message}");
        assert!(message.contains(reason) && message.contains("x.tokens"), "{message}");
    }
}

#[test]
fn a_token_outside_of_the_vocabulary_never_reaches_a_sample() {
    with_file(&bytes(&[1, 2, 3, 300, 4], 300), |file| {
        let file = file.unwrap();
        let error = file.check_tokens().unwrap_err();
        assert!(error.to_string().contains("token 3 is 300, outside of the vocabulary of 300"));
        let samples = file.samples(2).unwrap();
        assert!(samples.get(0).is_ok());
        assert!(matches!(samples.get(1), Err(Error::TokenFile { .. })));
    });
}

#[test]
fn content_is_verified_on_request() {
    let good = bytes(&[1, 2, 3], 300);
    with_file(&good, |file| {
        let file = file.unwrap();
        file.verify(&sha256_of(&good)).unwrap();
        let error = file.verify(&sha256_of(b"other")).unwrap_err();
        assert!(matches!(error, Error::HashMismatch { .. }), "{error}");
        assert_eq!(file.header().tokenizer_sha256, [7; 32]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn what_is_written_is_read(
        vocab_size in prop_oneof![2u32..70_000, Just(65_536), Just(65_537), Just(u32::MAX)],
        tokens in proptest::collection::vec(any::<u32>(), 2..300),
        seq_len in 1u32..40,
    ) {
        let tokens: Vec<u32> = tokens.into_iter().map(|token| token % vocab_size).collect();
        with_file(&bytes(&tokens, vocab_size), |file| {
            let file = file.unwrap();
            file.check_tokens().unwrap();
            prop_assert_eq!(file.header(), &header(&tokens, vocab_size));
            let Ok(samples) = file.samples(seq_len) else {
                prop_assert!(tokens.len() <= seq_len as usize);
                return Ok(());
            };
            let (mut inputs, mut labels) = (Vec::new(), Vec::new());
            for index in 0..samples.len() {
                samples.append(index, &mut inputs, &mut labels).unwrap();
            }
            prop_assert_eq!(&inputs[..], &tokens[..inputs.len()]);
            prop_assert_eq!(&labels[..], &tokens[1..=labels.len()]);
            prop_assert!(tokens.len() - labels.len() <= seq_len as usize);
            Ok(())
        })?;
    }

    #[test]
    fn mutations_never_panic(
        cut in 0usize..120,
        changes in proptest::collection::vec((0usize..120, any::<u8>()), 0..4),
        seq_len in 0u32..40,
    ) {
        let mut content = bytes(&(0..20).collect::<Vec<_>>(), 300);
        for (at, value) in changes {
            if let Some(byte) = content.get_mut(at) {
                *byte = value;
            }
        }
        content.truncate(cut.max(content.len().saturating_sub(cut)));
        with_file(&content, |file| {
            let Ok(file) = file else { return };
            let _ = file.check_tokens();
            if let Ok(samples) = file.samples(seq_len) {
                for index in 0..=samples.len() {
                    if let Ok((inputs, _)) = samples.get(index) {
                        assert!(inputs.iter().all(|&token| token < file.header().vocab_size));
                    }
                }
            }
        });
    }
}
