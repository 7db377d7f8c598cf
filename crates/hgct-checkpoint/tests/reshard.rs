//! Slices cut one way and read another.
#![allow(clippy::unwrap_used)]

mod common;

use common::{ROLES, elements, halves, head, model, owned, write};
use hgct_checkpoint::testing::MemoryDisk;
use hgct_checkpoint::{CHUNK_BYTES, Checkpoint, Checkpoints, LocalStore};
use hgct_core::model::ModelSpec;
use hgct_core::slice::{Role, Slice};
use proptest::prelude::*;
use std::sync::Arc;

fn committed(step: u64, model: &ModelSpec, owned: Vec<common::Owned>) -> Checkpoint {
    let store = LocalStore::on(Arc::new(MemoryDisk::new()), "/checkpoints");
    let checkpoints = Checkpoints::on(Arc::new(store));
    write(&checkpoints, head(step, model.clone()), owned, 2).unwrap();
    let newest = checkpoints.newest_verified().unwrap();
    assert!(newest.bad.is_empty());
    newest.checkpoint.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_cut_reads_back_as_any_other(
        ranks in 1u32..5,
        // Rank changes at random rows: adjacent ranges, ranges with gaps, whole tensors.
        owners in prop::collection::vec((1u64..30, 0u32..5), 1..40),
        cuts in prop::collection::vec(1u64..20, 1..20),
    ) {
        let model = model();
        let mut runs = owners.iter().cycle();
        let (mut left, mut rank) = (0, 0);
        let owned = owned(5, &model, ranks, |_, _| {
            if left == 0 {
                (left, rank) = runs.next().map(|(n, r)| (*n, r % ranks)).unwrap();
            }
            left -= 1;
            rank
        });
        let checkpoint = committed(5, &model, owned);

        let mut lengths = cuts.iter().cycle();
        let mut wanted = Vec::new();
        for tensor in model.tensors() {
            for role in ROLES {
                let mut begin = 0;
                while begin < tensor.rows() {
                    let end = tensor.rows().min(begin + lengths.next().unwrap());
                    wanted.push((Slice::rows_of(&tensor, begin..end), role));
                    begin = end;
                }
            }
        }
        // Any order.
        wanted.reverse();
        let mut read: Vec<Vec<u8>> = vec![Vec::new(); wanted.len()];
        let mut last = 0;
        for piece in checkpoint.read_slices(&wanted).unwrap() {
            let piece = piece.unwrap();
            prop_assert!(piece.wanted >= last);
            last = piece.wanted;
            let (slice, role) = &wanted[piece.wanted];
            prop_assert_eq!(*role, piece.role);
            let row_bytes = piece.bytes.len() as u64 / piece.slice.shape()[0];
            prop_assert_eq!(slice.begin[0] + read[piece.wanted].len() as u64 / row_bytes, piece.slice.begin[0]);
            read[piece.wanted].extend(piece.bytes);
        }
        for ((slice, role), bytes) in wanted.iter().zip(read) {
            let tensor = model.tensors().into_iter().find(|t| t.name == slice.tensor).unwrap();
            let expected: Vec<u8> =
                elements(5, &tensor, *role, slice.rows()).iter().flat_map(|x| x.to_le_bytes()).collect();
            prop_assert_eq!(bytes, expected, "{} {}", role.name(), slice);
        }
    }
}

#[test]
fn no_piece_is_longer_than_a_chunk_and_none_is_needlessly_short() {
    let model = ModelSpec { vocab_size: 9000, hidden_size: 96, ..model() };
    let checkpoint = committed(1, &model, halves(1, &model));
    let embedding = model.tensors().remove(0);
    let wanted = [(Slice::rows_of(&embedding, 100..8900), Role::M)];
    let pieces: Vec<_> = checkpoint.read_slices(&wanted).unwrap().map(Result::unwrap).collect();
    assert!(pieces.iter().all(|piece| piece.bytes.len() <= CHUNK_BYTES));
    // 4,400 rows of 384 bytes on each side of the cut, 2,730 rows a piece.
    assert_eq!(pieces.len(), 4);
    let read = checkpoint.read_f32(&wanted[0].0, Role::M).unwrap();
    assert_eq!(read, elements(1, &embedding, Role::M, 100..8900));
}

#[test]
fn what_is_not_there_is_named_before_anything_is_read() {
    let model = model();
    let checkpoint = committed(1, &model, halves(1, &model));
    let embedding = &model.tensors()[0];
    let error = |slice: Slice, role| checkpoint.read_slices(&[(slice, role)]).err().unwrap().to_string();
    assert_eq!(
        error(Slice::whole(embedding), Role::Master),
        "master model.embed_tokens.weight[0..24, 0..8]: not in /checkpoints/step-00000001"
    );
    assert_eq!(
        error(Slice::rows_of(embedding, 20..25), Role::M),
        "m model.embed_tokens.weight[20..25, 0..8]: not a row range of model.embed_tokens.weight[0..24, 0..8]"
    );
    let columns = Slice { tensor: embedding.name.clone(), begin: vec![0, 0], end: vec![24, 4] };
    assert!(error(columns, Role::M).contains("not a row range"));
    let empty = Slice { tensor: embedding.name.clone(), begin: vec![], end: vec![] };
    assert!(error(empty, Role::M).contains("not a row range"));
}
