//! What may be sent, what is kept, what is written: on a real folder.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{halves, head, model, owned, send, write};
use hgct_checkpoint::{CHUNK_BYTES, Checkpoints, Error, ShardWriter};
use hgct_core::canonical::Hash;
use hgct_core::ids::Rank;
use hgct_core::manifest::ShardEnd;
use hgct_core::model::ModelSpec;
use hgct_core::slice::Slice;

fn commit(checkpoints: &Checkpoints, step: u64, keep: usize) -> hgct_checkpoint::Result<Vec<u64>> {
    write(checkpoints, head(step, model()), halves(step, &model()), keep).map(|committed| committed.removed)
}

#[test]
fn the_newest_are_kept_and_a_committed_step_is_never_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path().join("run/checkpoints"));
    assert!(checkpoints.newest_verified().unwrap().checkpoint.is_none());
    assert_eq!(commit(&checkpoints, 10, 2).unwrap(), [0; 0]);
    assert_eq!(commit(&checkpoints, 20, 2).unwrap(), [0; 0]);
    assert_eq!(commit(&checkpoints, 30, 2).unwrap(), [10]);
    assert!(matches!(commit(&checkpoints, 30, 2), Err(Error::AlreadyCommitted { step: 30, .. })));
    assert_eq!(checkpoints.steps().unwrap(), [20, 30]);
    let names: Vec<_> = fs::read_dir(folder.path().join("run/checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn a_writer_that_is_dropped_keeps_a_step_that_another_committed() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path());
    let dropped = checkpoints.begin(head(10, model()), [Rank(0), Rank(1)], 2).unwrap();
    commit(&checkpoints, 10, 2).unwrap();
    drop(dropped);
    checkpoints.verify(10).unwrap();
}

#[test]
fn a_person_may_name_the_run_its_checkpoints_or_one_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("checkpoints");
    commit(&Checkpoints::open(&inside), 10, 2).unwrap();
    for (path, step) in [(folder.path(), None), (&inside, None), (&inside.join("step-00000010"), Some(10))] {
        let (checkpoints, found) = Checkpoints::find(path).unwrap();
        assert_eq!(found, step);
        assert_eq!(checkpoints.steps().unwrap(), [10]);
    }
    let elsewhere = Checkpoints::find(&folder.path().join("elsewhere")).err().unwrap().to_string();
    assert!(elsewhere.ends_with("elsewhere has no committed checkpoint"), "{elsewhere}");
    let error = Checkpoints::open(&inside).verify(11).unwrap_err().to_string();
    assert!(error.ends_with("has no committed checkpoint of step 11"), "{error}");
}

#[test]
fn pieces_out_of_place_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path());
    let begin = || checkpoints.begin(head(1, model()), [Rank(0), Rank(1)], 2).unwrap();
    let refused = |result: hgct_checkpoint::Result<()>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
    };
    refused(
        begin().piece(Rank(2), 0, b"x", None),
        "rank 2: a piece of 1 bytes at byte 0 of its shard, expected none: the rank owns nothing",
    );
    refused(begin().piece(Rank(0), 8, b"x", None), "expected byte 0");
    refused(begin().piece(Rank(0), 0, &vec![0; CHUNK_BYTES + 1], None), "in all");
    refused(
        begin().piece(
            Rank(0),
            0,
            &[0; 8],
            Some(ShardEnd { entries: Vec::new(), sha256: Hash::of_bytes(&[0; 8]) }),
        ),
        "is damaged: safetensors header: EOF while parsing a value at line 1 column 0",
    );

    // What a shard says that it holds must be what it holds.
    let mut shards = halves(1, &model()).into_iter();
    let mut shard = ShardWriter::new(shards.next().unwrap()).unwrap();
    let mut piece = Vec::new();
    assert!(shard.next_chunk(&mut piece).unwrap().last);
    let mut end = shard.end();
    end.entries[3].slice.end[0] -= 1;
    refused(
        begin().piece(Rank(0), 0, &piece, Some(end)),
        "the manifest has f32 model.layers.0.mlp.gate_proj.weight[0..5, 0..8]",
    );
    // And what its owner sent: one bit of a value that changed on its way is seen.
    let mut changed = piece.clone();
    *changed.last_mut().unwrap() ^= 1;
    refused(begin().piece(Rank(0), 0, &changed, Some(shard.end())), "it was changed on its way");
    let mut to = begin();
    to.piece(Rank(0), 0, &piece, Some(shard.end())).unwrap();
    refused(to.piece(Rank(0), 0, &piece, None), "expected none after the last");
    assert_eq!(to.missing(), [Rank(1)]);
    refused(to.commit().map(drop), "step 1: no complete shard from rank 1");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn shards_that_leave_a_row_out_are_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path());
    let mut owned = halves(1, &model());
    owned[1].retain(|(slice, _, _)| slice.tensor != "model.norm.weight");
    let error = write(&checkpoints, head(1, model()), owned, 2).unwrap_err().to_string();
    assert!(error.contains("without row 4 of parameter model.norm.weight"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn damage_is_named_and_the_one_before_is_used() {
    let damage = |at: &str, change: fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path());
        commit(&checkpoints, 10, 2).unwrap();
        commit(&checkpoints, 20, 2).unwrap();
        change(&folder.path().join("step-00000020").join(at));
        let newest = checkpoints.newest_verified().unwrap();
        assert_eq!(newest.checkpoint.unwrap().manifest().step, 10);
        assert_eq!((newest.bad.len(), newest.bad[0].step), (1, 20));
        // The run goes on from 10 and comes to 20 again.
        commit(&checkpoints, 20, 2).unwrap();
        assert_eq!(checkpoints.newest_verified().unwrap().checkpoint.unwrap().manifest().step, 20);
        newest.bad[0].reason.to_string()
    };
    let said = damage("shard-r1.safetensors", |path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(
        said.contains("step-00000020/shard-r1.safetensors is damaged: ")
            && said.contains("bytes, written were"),
        "{said}"
    );
    let said = damage("shard-r0.safetensors", |path| {
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, &bytes).unwrap();
    });
    assert!(said.contains("shard-r0.safetensors is damaged: its SHA-256 is"), "{said}");
    let said = damage("shard-r0.safetensors", |path| fs::remove_file(path).unwrap());
    assert!(said.ends_with("shard-r0.safetensors is damaged: it is not there"), "{said}");
    let said = damage("manifest.json", |path| {
        let text = fs::read_to_string(path).unwrap();
        fs::write(path, &text[..text.len() / 2]).unwrap();
    });
    assert!(said.contains("manifest.json, line"), "{said}");
    let said = damage("manifest.json", |path| {
        let text = fs::read_to_string(path).unwrap();
        fs::write(path, text.replace("\"step\": 20", "\"step\": 2")).unwrap();
    });
    assert!(said.ends_with("it is of step 2"), "{said}");
}

/// Pins the manifest's form, and through the hashes in it every byte of the shards.
#[test]
fn the_written_form_is_the_golden_one() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path());
    let model = ModelSpec { num_layers: 1, ..model() };
    let mut head = head(20, model.clone());
    head.num_updates = 19;
    head.tokenizer = Some(Hash::of_bytes(b"tokenizer"));
    // Rank 0 has the embedding and half of the rest, rank 1 the other half.
    let owned = owned(20, &model, 2, |t, row| u32::from(t.name.contains("layers") && row >= t.rows() / 2));
    write(&checkpoints, head, owned, 2).unwrap();
    let written = fs::read_to_string(folder.path().join("step-00000020/manifest.json")).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/manifest.json");
    if std::env::var_os("HGCT_UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &written).unwrap();
    }
    assert_eq!(written, fs::read_to_string(golden).unwrap(), "HGCT_UPDATE_GOLDEN=1 accepts a wanted change");
}

#[test]
fn the_summary_counts_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path());
    commit(&checkpoints, 10, 2).unwrap();
    let summary = checkpoints.verify(10).unwrap().summary();
    assert_eq!(summary.num_parameters, model().num_parameters());
    assert_eq!(summary.roles.len(), 3);
    let role = &summary.roles[1];
    assert_eq!((role.num_tensors, role.num_slices), (20, 40));
    assert_eq!(role.size_bytes, 4 * model().num_parameters());
    let text = summary.to_string();
    assert!(text.contains("step        10 (10 updates)") && text.contains("shard-r1.safetensors"), "{text}");
    assert_eq!(serde_json::to_value(&summary).unwrap()["rows"][0]["file"], "shard-r0.safetensors");
}

#[test]
fn an_owner_may_send_after_others_are_done() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path());
    let mut to = checkpoints.begin(head(1, model()), [Rank(0), Rank(1)], 2).unwrap();
    for (rank, of_rank) in halves(1, &model()).into_iter().enumerate().rev() {
        send(&mut to, vec![(Rank(rank as u32), ShardWriter::new(of_rank).unwrap())]).unwrap();
    }
    let manifest = to.commit().unwrap().manifest;
    assert_eq!(manifest.shards[0].entries[0].slice, Slice::rows_of(&model().tensors()[0], 0..12));
}
