//! Files of a stranger: whatever they say, an error and no panic, no long wait, no huge buffer.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use common::{ROLES, halves, head, model, write};
use hgct_checkpoint::testing::MemoryDisk;
use hgct_checkpoint::{Checkpoints, LocalStore};
use hgct_core::canonical::Hash;
use hgct_core::slice::Slice;
use proptest::prelude::*;

const MANIFEST: &str = "/c/step-00000001/manifest.json";
const SHARD: &str = "/c/step-00000001/shard-r0.safetensors";

/// A good checkpoint's files.
fn files() -> &'static (Vec<u8>, Vec<u8>, Vec<u8>) {
    static FILES: OnceLock<(Vec<u8>, Vec<u8>, Vec<u8>)> = OnceLock::new();
    FILES.get_or_init(|| {
        let disk = MemoryDisk::new();
        write(&on(&disk), head(1, model()), halves(1, &model()), 2).unwrap();
        let read = |path: &str| {
            let mut bytes = Vec::new();
            disk.tamper(Path::new(path), |content| bytes.clone_from(content));
            bytes
        };
        (read(MANIFEST), read(SHARD), read("/c/step-00000001/shard-r1.safetensors"))
    })
}

fn on(disk: &MemoryDisk) -> Checkpoints {
    Checkpoints::on(Arc::new(LocalStore::on(Arc::new(disk.clone()), "/c")))
}

/// Puts a manifest and rank 0's shard in place and uses all that can be used.
fn open(manifest: &[u8], shard: &[u8]) -> Option<String> {
    use hgct_checkpoint::disk::Disk as _;
    let disk = MemoryDisk::new();
    disk.create_dir("/c".as_ref()).unwrap();
    disk.create_dir("/c/step-00000001".as_ref()).unwrap();
    for (path, bytes) in
        [(MANIFEST, manifest), (SHARD, shard), ("/c/step-00000001/shard-r1.safetensors", &files().2)]
    {
        disk.create(PathBuf::from(path).as_path()).unwrap();
        disk.tamper(path.as_ref(), |content| content.extend_from_slice(bytes));
    }
    let newest = on(&disk).newest_verified().unwrap();
    let Some(checkpoint) = newest.checkpoint else {
        return Some(newest.bad[0].reason.to_string());
    };
    drop(checkpoint.summary().to_string());
    for tensor in checkpoint.manifest().model.tensors() {
        for role in ROLES {
            if let Ok(pieces) = checkpoint.read_slices(&[(Slice::whole(&tensor), role)]) {
                pieces.for_each(drop);
            }
        }
    }
    None
}

/// The manifest with rank 0's length and hash as they are.
fn manifest_for(shard: &[u8]) -> Vec<u8> {
    let (manifest, good, _) = files();
    let text = String::from_utf8(manifest.clone()).unwrap();
    let text = text.replace(Hash::of_bytes(good).as_str(), Hash::of_bytes(shard).as_str());
    let size = |bytes: &[u8]| format!("\"size_bytes\": {}", bytes.len());
    text.replacen(&size(good), &size(shard), 1).into_bytes()
}

#[derive(Debug, Clone)]
enum Change {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Cut(usize, usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Set(at, value) => {
                let at = at % bytes.len();
                bytes[at] = *value;
            }
            Self::Insert(at, more) => {
                let at = at % bytes.len();
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Cut(at, count) => {
                let at = at % bytes.len();
                let end = bytes.len().min(at + count);
                bytes.drain(at..end);
                bytes.push(b'}');
            }
        }
    }
}

fn change(within: usize) -> impl Strategy<Value = Change> {
    let token = prop_oneof![
        Just(b"9".to_vec()),
        Just(b"18446744073709551615".to_vec()),
        Just(b"-1".to_vec()),
        Just(b"\"a\":[],".to_vec()),
        Just(b"[[[[".to_vec()),
        Just(b"\\u0000".to_vec()),
        prop::collection::vec(any::<u8>(), 1..9),
    ];
    prop_oneof![
        (0..within, prop_oneof![any::<u8>(), b'0'..=b'9']).prop_map(|(at, value)| Change::Set(at, value)),
        (0..within, token).prop_map(|(at, more)| Change::Insert(at, more)),
        (0..within, 1usize..40).prop_map(|(at, count)| Change::Cut(at, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_manifest_panics(changes in prop::collection::vec(change(30_000), 1..4)) {
        let mut manifest = files().0.clone();
        for change in &changes {
            change.apply(&mut manifest);
        }
        open(&manifest, &files().1);
    }

    #[test]
    fn no_shard_panics(changes in prop::collection::vec(change(6_000), 1..4)) {
        let mut shard = files().1.clone();
        for change in &changes {
            change.apply(&mut shard);
        }
        // As it was hashed otherwise, and as if its writer had meant it.
        let changed = shard != files().1;
        prop_assert_eq!(open(&files().0, &shard).is_some(), changed);
        open(&manifest_for(&shard), &shard);
    }

    #[test]
    fn what_another_reader_refuses_is_refused_here(changes in prop::collection::vec(change(6_000), 1..3)) {
        let mut shard = files().1.clone();
        for change in &changes {
            change.apply(&mut shard);
        }
        let accepted = open(&manifest_for(&shard), &shard).is_none();
        prop_assert!(!accepted || safetensors::SafeTensors::deserialize(&shard).is_ok());
    }
}

#[test]
fn good_files_are_good() {
    assert_eq!(open(&files().0, &files().1), None);
    assert_eq!(open(&manifest_for(&files().1), &files().1), None);
}

#[test]
fn lengths_that_lie_are_refused_before_memory_is_taken() {
    let mut shard = files().1.clone();
    shard[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let error = open(&manifest_for(&shard), &shard).unwrap();
    assert!(error.contains("safetensors header: says that it has 18446744073709551615 bytes"), "{error}");
    let text = String::from_utf8(files().0.clone()).unwrap();
    for (from, to, said) in [
        ("\"num_layers\": 2", "\"num_layers\": 4294967295", "`model.num_layers` is 4294967295"),
        ("\"vocab_size\": 24", "\"vocab_size\": 4294967295", "`model.vocab_size` is 4294967295"),
        ("\"vocab_size\": 24", "\"vocab_size\": 23", "must be a row range of [23, 8]"),
        ("\"vocab_size\": 24", "\"vocab_size\": 25", "without row 24 of parameter model.embed_tokens.weight"),
        ("shard-r1", "../shard-r1", "a name of its own"),
        ("\"format\": 1", "\"format\": 2", "`format` is 2"),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        let error = open(changed.as_bytes(), &files().1).unwrap();
        assert!(error.contains(said), "{from} to {to}: {error}");
    }
}
