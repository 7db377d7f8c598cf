use super::*;
use crate::storage::Sink;
use std::io::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text");
        fs::create_dir(&text).unwrap();
        for (name, content) in
            [("a.txt", include_str!("source.rs")), ("b.txt", include_str!("prepare.rs")), ("empty.txt", "")]
        {
            fs::write(text.join(name), content).unwrap();
        }
        let rows = ["one <|endoftext|> in the text", include_str!("split.rs")]
            .map(|text| serde_json::json!({ "text": text }).to_string());
        fs::write(text.join("c.jsonl"), rows.join("\n")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self, cache: &str) -> Options {
        Options {
            sources: Sources::resolve(&["text"], self.folder.path()).unwrap(),
            tokenizer: TokenizerChoice::Train { vocab_size: 300, train_bytes: 20_000 },
            held_out: 0.1,
            max_bytes: None,
            threads: 2,
            cache: self.path(cache),
        }
    }
}

fn run(options: &Options) -> Result<Prepared> {
    prepare(options, &mut |_| {})
}

/// All files of a folder with their content.
fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    files
}

fn tokens(path: &Path) -> Vec<u32> {
    let file = TokenFile::open(path).unwrap();
    file.check_tokens().unwrap();
    file.iter().collect()
}

#[test]
fn everything_is_encoded_once_in_order() {
    let fixture = Fixture::new();
    let prepared = run(&fixture.options("cache")).unwrap();
    let meta = &prepared.meta;
    assert_eq!((meta.source_files, meta.empty_files, meta.documents), (3, 1, 4));
    let tokenizer = Tokenizer::open(&prepared.tokenizer_path(), None).unwrap();
    let (train, held) = (tokens(&prepared.train_path()), tokens(&prepared.held_out_path()));
    assert_eq!((train.len() as u64, held.len() as u64), (meta.train_tokens, meta.held_out_tokens));
    let all = meta.train_tokens + meta.held_out_tokens;
    assert!(meta.held_out_tokens.abs_diff(all / 10) <= 1, "{meta:?}");
    // Put the held-out block back where it was cut out.
    let at = held_out(all, 0.1).unwrap()[0].start as usize;
    let joined = [&train[..at], &held, &train[at..]].concat();
    let documents: Vec<String> = joined
        .split(|&token| token == tokenizer.end_of_text())
        .map(|document| tokenizer.decode(document).unwrap())
        .collect();
    let expected = [
        include_str!("source.rs"),
        include_str!("prepare.rs"),
        "one <|endoftext|> in the text",
        include_str!("split.rs"),
        "",
    ];
    assert_eq!(documents, expected);
    let digest = Sha256::digest(fs::read(prepared.tokenizer_path()).unwrap());
    let file = TokenFile::open(&prepared.train_path()).unwrap();
    assert_eq!(file.header().tokenizer_sha256[..], digest[..]);
}

#[test]
fn the_result_depends_on_content_and_options_alone() {
    let fixture = Fixture::new();
    let first = run(&fixture.options("cache-1")).unwrap();
    // Another place, other file names, other threads, another cache.
    let renamed = fixture.path("elsewhere");
    fs::create_dir(&renamed).unwrap();
    for (from, to) in [("a.txt", "1.txt"), ("b.txt", "2.txt"), ("c.jsonl", "3.jsonl")] {
        fs::copy(fixture.path("text").join(from), renamed.join(to)).unwrap();
    }
    let sources = Sources::resolve(&["elsewhere/*"], fixture.folder.path()).unwrap();
    let options = Options { sources, threads: 1, ..fixture.options("cache-2") };
    let second = run(&options).unwrap();
    assert_eq!(first.folder.file_name(), second.folder.file_name());
    let tokens = |prepared: &Prepared| {
        let mut files = content(&prepared.folder);
        files.retain(|(name, _)| name != META);
        files
    };
    assert!(tokens(&first) == tokens(&second), "two runs differ");
    // The tokenizer that came out, given, encodes the same.
    let path = first.tokenizer_path();
    let tokenizer = TokenizerChoice::Given { path, end_of_text: None };
    let given = run(&Options { tokenizer, ..fixture.options("cache-3") }).unwrap();
    assert_ne!(given.meta.key, first.meta.key);
    assert!(tokens(&given) == tokens(&first), "a given tokenizer encodes otherwise");
}

#[test]
fn a_second_run_reuses_what_is_there_and_mends_what_is_damaged() {
    let fixture = Fixture::new();
    let options = fixture.options("cache");
    let first = run(&options).unwrap();
    let before = content(&first.folder);
    let second = run(&options).unwrap();
    assert_eq!((first.reused, second.reused), (false, true));
    assert_eq!((&second.meta, &second.folder), (&first.meta, &first.folder));
    for (name, _) in &before {
        if name == TOKENIZER_CONFIG {
            continue;
        }
        let path = first.folder.join(name);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mended = run(&options).unwrap();
        // A changed hash in `meta.json` counts as damage too; a changed count does not open.
        if name != META {
            assert!(!mended.reused, "{name}");
        }
        fs::remove_dir_all(&first.folder).unwrap();
        run(&options).unwrap();
        assert!(content(&first.folder) == before, "{name}");
    }
    assert_eq!(fs::read_dir(fixture.path("cache")).unwrap().count(), 1);
}

#[test]
fn other_text_or_options_are_another_entry() {
    let fixture = Fixture::new();
    let mut keys = vec![run(&fixture.options("cache")).unwrap().meta.key];
    let options = Options { held_out: 0.2, ..fixture.options("cache") };
    keys.push(run(&options).unwrap().meta.key);
    let options = Options { max_bytes: Some(10_000), ..fixture.options("cache") };
    let limited = run(&options).unwrap();
    assert_eq!(limited.meta.used_bytes, 10_000);
    keys.push(limited.meta.key);
    fs::write(fixture.path("text/empty.txt"), "no longer").unwrap();
    keys.push(run(&fixture.options("cache")).unwrap().meta.key);
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 4);
}

#[test]
fn bad_input_leaves_the_cache_as_it_was() {
    let fixture = Fixture::new();
    let options = fixture.options("cache");
    let first = run(&options).unwrap();
    fs::write(fixture.path("text/empty.txt"), b"x\n\xff").unwrap();
    assert!(matches!(run(&options), Err(Error::NotText { line: 2, .. })));
    let tokenizer = TokenizerChoice::Given { path: fixture.path("none.json"), end_of_text: None };
    let missing = run(&Options { tokenizer, ..options.clone() }).unwrap_err();
    assert!(missing.to_string().contains("none.json"), "{missing}");
    let share = Options { held_out: 0.9, ..options.clone() };
    assert!(matches!(run(&share), Err(Error::Option { key: "held_out", .. })));
    fs::write(fixture.path("text/empty.txt"), b"").unwrap();
    assert_eq!(run(&options).unwrap().meta, first.meta);
    let sources = Sources::resolve(&["text/empty.txt"], fixture.folder.path()).unwrap();
    assert!(matches!(run(&Options { sources, ..options }), Err(Error::Empty { .. })));
    assert_eq!(fs::read_dir(fixture.path("cache")).unwrap().count(), 1);
}

#[test]
fn a_source_that_changes_meanwhile_is_noticed() {
    let fixture = Fixture::new();
    let path = fixture.path("text/b.txt");
    let mut options = fixture.options("cache");
    options.tokenizer = TokenizerChoice::Train { vocab_size: 300, train_bytes: 1000 };
    let error = prepare(&options, &mut |progress| {
        if progress.phase == Phase::TrainTokenizer {
            fs::write(&path, "other text").unwrap();
        }
    })
    .unwrap_err();
    assert!(matches!(&error, Error::Changed { path: changed } if changed == &path), "{error}");
    assert_eq!(fs::read_dir(fixture.path("cache")).unwrap().count(), 0);
}

/// Refuses the byte or file numbered `fails_at` and all after it.
struct Full {
    file: File,
    left: std::sync::Arc<AtomicU64>,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = |left: u64| left.checked_sub(1);
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_err() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Full {
    fn sync(&mut self) -> io::Result<()> {
        let take = |left: u64| left.checked_sub(1);
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

#[test]
fn a_full_disk_at_any_write_leaves_nothing_behind() {
    let fixture = Fixture::new();
    let options = fixture.options("cache");
    let mut failures = 0;
    for allowed in 0.. {
        let left = std::sync::Arc::new(AtomicU64::new(allowed));
        let create = |path: &Path| -> io::Result<Box<dyn Sink>> {
            Ok(Box::new(Full { file: File::create_new(path)?, left: left.clone() }))
        };
        match prepare_with(&options, &mut |_| {}, &create) {
            Ok(_) => break,
            Err(error) => {
                failures += 1;
                assert!(error.is_disk_full(), "{error}");
                assert!(error.to_string().contains("no space is left"), "{error}");
                assert_eq!(fs::read_dir(fixture.path("cache")).unwrap().count(), 0);
            }
        }
    }
    // A write and a sync for each of the six files.
    assert!(failures >= 12, "{failures}");
    assert!(run(&options).unwrap().reused);
}

#[test]
fn progress_names_each_phase_and_reaches_its_end() {
    let fixture = Fixture::new();
    let seen = Mutex::new(Vec::new());
    prepare(&fixture.options("cache"), &mut |progress| seen.lock().unwrap().push(progress)).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted_by_key(|progress| (progress.phase, progress.done)));
    let last = seen.last().unwrap();
    assert_eq!((last.phase, last.done), (Phase::Encode, last.total));
}

#[test]
fn a_share_is_taken_evenly() {
    let mut share = Share::new(1000, 10_000);
    let piece = "é".repeat(25);
    let taken: Vec<usize> = (0..200).map(|_| share.take(&piece).len()).collect();
    assert_eq!(taken.iter().sum::<usize>(), 1000);
    for tenth in taken.chunks(20) {
        let sum: usize = tenth.iter().sum();
        assert!((50..=150).contains(&sum), "{sum}");
    }
}
