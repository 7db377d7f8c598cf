//! A tiny model whose elements tell where they belong, and checkpoints of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::ops::Range;

use hgct_checkpoint::{CHUNK_BYTES, CheckpointWriter, Checkpoints, Committed, Result, ShardWriter};
use hgct_core::canonical::Hash;
use hgct_core::ids::{Generation, Rank, RunId};
use hgct_core::manifest::Manifest;
use hgct_core::model::{ModelSpec, RopeScaling, TensorSpec};
use hgct_core::slice::{Role, Slice};

pub const ROLES: [Role; 3] = [Role::Parameter, Role::M, Role::V];

pub type Owned = Vec<(Slice, Role, Vec<f32>)>;

pub fn model() -> ModelSpec {
    ModelSpec {
        vocab_size: 24,
        hidden_size: 8,
        intermediate_size: 12,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::Default,
        tie_embeddings: true,
        max_position: 32,
        initializer_range: 0.02,
    }
}

pub fn head(step: u64, model: ModelSpec) -> Manifest {
    Manifest {
        format: Manifest::FORMAT,
        run: RunId::new("run").unwrap(),
        generation: Generation { epoch: 1, sequence: 2 },
        step,
        num_updates: step,
        job: Hash::of_bytes(b"job"),
        plan: Hash::of_bytes(b"plan"),
        model,
        tokenizer: None,
        shards: Vec::new(),
    }
}

/// Elements of a row range: all different within a tensor, and others for each step and role.
pub fn elements(step: u64, tensor: &TensorSpec, role: Role, rows: Range<u64>) -> Vec<f32> {
    let salt = tensor.name.bytes().fold(step * 7 + role as u64, |h, b| (h * 31 + u64::from(b)) % 4096);
    let width = tensor.row_elements();
    (rows.start * width..rows.end * width).map(|i| i as f32 + salt as f32 / 4096.0).collect()
}

/// Gives each rank the rows of each tensor that `rank_of` says, for all roles.
pub fn owned(
    step: u64,
    model: &ModelSpec,
    ranks: u32,
    mut rank_of: impl FnMut(&TensorSpec, u64) -> u32,
) -> Vec<Owned> {
    let mut owned: Vec<Owned> = vec![Vec::new(); ranks as usize];
    for tensor in model.tensors() {
        let of_row: Vec<u32> = (0..tensor.rows()).map(|row| rank_of(&tensor, row)).collect();
        let mut begin = 0;
        for run in of_row.chunk_by(|a, b| a == b) {
            let end = begin + run.len() as u64;
            for role in ROLES {
                let slice = Slice::rows_of(&tensor, begin..end);
                let data = elements(step, &tensor, role, begin..end);
                owned[run[0] as usize].push((slice, role, data));
            }
            begin = end;
        }
    }
    owned
}

/// Two ranks, each with one half of the rows of every tensor.
pub fn halves(step: u64, model: &ModelSpec) -> Vec<Owned> {
    owned(step, model, 2, |tensor, row| u32::from(row >= tensor.rows() / 2))
}

/// Cleans, sends the shards' pieces in turn and commits.
pub fn write(checkpoints: &Checkpoints, head: Manifest, owned: Vec<Owned>, keep: usize) -> Result<Committed> {
    let ranks = (0..owned.len() as u32).map(Rank);
    checkpoints.clean()?;
    let mut to = checkpoints.begin(head, ranks.clone(), keep)?;
    send(&mut to, ranks.zip(owned.into_iter().map(|of_rank| ShardWriter::new(of_rank).unwrap())).collect())?;
    to.commit()
}

pub fn send(to: &mut CheckpointWriter, mut from: Vec<(Rank, ShardWriter<Vec<f32>>)>) -> Result<()> {
    let mut piece = Vec::with_capacity(CHUNK_BYTES);
    while !from.is_empty() {
        let mut open = Vec::new();
        for (rank, mut shard) in from {
            let chunk = shard.next_chunk(&mut piece).unwrap();
            let end = chunk.last.then(|| shard.end());
            to.piece(rank, chunk.offset, &piece, end)?;
            if !chunk.last {
                open.push((rank, shard));
            }
        }
        from = open;
    }
    Ok(())
}
