use super::*;
use proptest::prelude::*;

fn write(folder: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn scan(name: &str, content: &[u8]) -> Result<Scan> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), name, content);
    Sources::resolve(&[name], folder.path())?.files()[0].scan()
}

/// The documents of one file.
fn documents(name: &str, content: &[u8]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let sources = Sources::from_files([write(folder.path(), name, content)]);
    let (mut documents, mut open) = (Vec::new(), String::new());
    sources.files()[0]
        .read(&mut |piece| {
            assert!(!piece.text.is_empty() && piece.text.len() <= PIECE_BYTES);
            open.push_str(piece.text);
            if piece.ends_document {
                documents.push(std::mem::take(&mut open));
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(open, "", "the last document has no end");
    documents
}

#[test]
fn files_folders_and_globs_come_in_a_fixed_order_and_once() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["b.txt", "a.md", "sub/c.txt", "sub/deep/d.txt", ".hidden/x.txt", "sub/.x.txt"] {
        write(folder.path(), name, b"x");
    }
    let names = |patterns: &[&str]| -> Vec<String> {
        let sources = Sources::resolve(patterns, folder.path()).unwrap();
        let name = |file: &SourceFile| file.path.strip_prefix(folder.path()).unwrap().to_owned();
        sources.files().iter().map(|file| name(file).to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&["."]), ["a.md", "b.txt", "sub/c.txt", "sub/deep/d.txt"]);
    assert_eq!(names(&["*.txt"]), ["b.txt"]);
    assert_eq!(names(&["**/*.txt"]), ["b.txt", "sub/c.txt", "sub/deep/d.txt"]);
    assert_eq!(names(&["sub/*.{txt,md}", "b.txt"]), ["sub/c.txt", "b.txt"]);
    assert_eq!(names(&["b.txt", "sub/..", "b.txt"]).len(), 4);
    let absolute = folder.path().join("sub").to_str().unwrap().to_owned();
    assert_eq!(names(&[&absolute]), ["sub/c.txt", "sub/deep/d.txt"]);
}

#[test]
fn a_path_without_text_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for pattern in ["none.txt", "none/**/*.rs", "*.rs"] {
        let error = Sources::resolve(&[pattern], folder.path()).unwrap_err();
        assert!(matches!(error, Error::NoMatch { .. }), "{error}");
        assert!(error.to_string().contains(pattern), "{error}");
    }
    let error = Sources::resolve(&["a[.txt"], folder.path()).unwrap_err();
    assert!(matches!(error, Error::Glob { .. }), "{error}");
    assert!(matches!(Sources::resolve::<&str>(&[], folder.path()), Err(Error::Option { .. })));
    let error = Sources::resolve(&["/dev/null"], folder.path()).unwrap_err();
    assert!(matches!(error, Error::Io { operation: "read", .. }), "{error}");
}

#[test]
fn empty_and_binary_files_are_named_with_their_line() {
    assert!(matches!(scan("a.txt", b""), Err(Error::Empty { .. })));
    assert!(matches!(scan("a.jsonl", b"\n \n{\"text\":\"\"}\n"), Err(Error::Empty { .. })));
    let error = scan("a.txt", b"one\ntwo\n\xff\n").unwrap_err();
    assert!(matches!(error, Error::NotText { line: 3, offset: 8, .. }), "{error:?}");
    let error = scan("a.txt", b"one\nt\0o\n").unwrap_err();
    assert!(error.to_string().contains("a.txt, line 2: a NUL byte"), "{error}");
    // The same far into a file that is read in pieces.
    let mut long = b"a line of text\n".repeat(20_000);
    long.extend(b"and then \xc3");
    let error = scan("a.txt", &long).unwrap_err();
    assert!(matches!(error, Error::NotText { line: 20_001, offset: 300_009, .. }), "{error:?}");
}

#[test]
fn errors_in_jsonl_have_line_numbers() {
    for (bad, reason) in [
        ("{\"text\": 1}", "invalid type: integer `1`, expected a string at column 10"),
        ("{\"body\": \"x\"}", "missing field `text`"),
        ("{\"text\": \"x\"", "EOF while parsing an object"),
        ("[1]", "invalid"),
        ("plain", "expected value"),
    ] {
        let content = format!("{{\"text\": \"x\", \"id\": 1}}\n\n{bad}\n");
        let error = scan("a.jsonl", content.as_bytes()).unwrap_err();
        assert!(matches!(error, Error::Jsonl { line: 3, .. }), "{error:?}");
        let message = error.to_string();
        assert!(message.contains("a.jsonl, line 3: ") && message.contains(reason), "{message}");
    }
    let error = scan("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": \"\xff\"}\n").unwrap_err();
    assert!(matches!(error, Error::NotText { line: 2, .. }), "{error:?}");
}

#[test]
fn each_row_of_jsonl_is_a_document() {
    let content = b"{\"text\": \"one\\n\"}\r\n\n{\"id\": 2, \"text\": \"\"}\n{\"text\": \"\\u00e9\"}";
    assert_eq!(documents("a.jsonl", content), ["one\n", "é"]);
    let found = scan("a.ndjson", content).unwrap();
    assert_eq!((found.documents, found.text_bytes), (2, 6));
    assert_eq!((found.file_bytes, found.sha256), (content.len() as u64, Hash::of_bytes(content)));
}

#[test]
fn long_documents_are_cut_where_a_line_starts() {
    let line = "    indented\nflush\n";
    let text = line.repeat(20_000);
    assert_eq!(documents("a.txt", text.as_bytes()), [text.as_str()]);
    let window = text.as_bytes();
    assert_eq!(&text[cut(window)..][..5], "flush");
    let blank = " \n".repeat(PIECE_BYTES);
    assert_eq!(cut(blank.as_bytes()), PIECE_BYTES - 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_text_comes_through_whole(
        part in "[\\PC\n ]{1,30}",
        repeat in 1usize..8000,
        jsonl: bool,
    ) {
        let text = part.repeat(repeat);
        if jsonl {
            let rows = format!("{}\n", serde_json::json!({ "text": text }));
            prop_assert_eq!(documents("a.jsonl", rows.as_bytes()), [text]);
        } else {
            prop_assert_eq!(documents("a.txt", text.as_bytes()), [text]);
        }
    }

    #[test]
    fn any_bytes_end_in_text_or_a_typed_error(
        bytes in proptest::collection::vec(any::<u8>(), 1..400),
        jsonl: bool,
    ) {
        let name = if jsonl { "a.jsonl" } else { "a.txt" };
        match scan(name, &bytes) {
            Ok(scan) => prop_assert_eq!(scan.file_bytes, bytes.len() as u64),
            Err(Error::NotText { .. } | Error::Jsonl { .. } | Error::Empty { .. }) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
