//! Writes a checkpoint of initial parameters, cut among three owners, and its export:
//!
//! ```text
//! cargo run -p hgct-checkpoint --example tiny_checkpoint -- CONFIG_JSON OUT [TOKENIZER_JSON]
//! ```
//!
//! `OUT/checkpoints/step-00000001/` and `OUT/hf/` are what other readers are tested with.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use hgct_checkpoint::{Checkpoints, ExportOptions, ExportTokenizer, ShardWriter, export_hf};
use hgct_core::canonical::Hash;
use hgct_core::ids::{Generation, Rank, RunId};
use hgct_core::init;
use hgct_core::manifest::Manifest;
use hgct_core::model::ModelSpec;
use hgct_core::slice::{Role, Slice};

const OWNERS: u64 = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, out, tokenizer @ ..] = arguments.as_slice() else {
        return Err("usage: tiny_checkpoint CONFIG_JSON OUT [TOKENIZER_JSON]".into());
    };
    let model = ModelSpec::from_config_json(config, &fs::read_to_string(config)?)?;
    let head = Manifest {
        format: Manifest::FORMAT,
        run: RunId::new("tiny")?,
        generation: Generation::default(),
        step: 1,
        num_updates: 0,
        job: Hash::of_bytes(b"no job"),
        plan: Hash::of_bytes(b"no plan"),
        model: model.clone(),
        tokenizer: None,
        shards: Vec::new(),
    };
    let out = Path::new(out);
    let checkpoints = Checkpoints::open(out.join("checkpoints"));
    checkpoints.clean()?;
    let mut to = checkpoints.begin(head, (0..OWNERS as u32).map(Rank), 2)?;
    for owner in 0..OWNERS {
        let mut shard = ShardWriter::new(slices(&model, owner))?;
        let mut piece = Vec::new();
        while let Some(chunk) = shard.next_chunk(&mut piece) {
            let end = chunk.last.then(|| shard.end());
            to.piece(Rank(owner as u32), chunk.offset, &piece, end)?;
        }
    }
    to.commit()?;
    let checkpoint = checkpoints.verify(1)?;
    println!("{}", checkpoint.summary());
    let tokenizer =
        tokenizer.first().map(|path| ExportTokenizer { path: PathBuf::from(path), config_json: None });
    let exported = export_hf(&checkpoint, tokenizer.as_ref(), &out.join("hf"), &ExportOptions::default())?;
    println!("{}: {}", exported.path, exported.files.join(", "));
    Ok(())
}

/// Rows `owner / OWNERS` to `(owner + 1) / OWNERS` of every tensor, with moments.
fn slices(model: &ModelSpec, owner: u64) -> Vec<(Slice, Role, Vec<f32>)> {
    let mut slices = Vec::new();
    for tensor in model.tensors() {
        let rows = owner * tensor.rows() / OWNERS..(owner + 1) * tensor.rows() / OWNERS;
        if rows.is_empty() {
            continue;
        }
        let first = rows.start * tensor.row_elements();
        let slice = Slice::rows_of(&tensor, rows);
        for (role, seed) in [(Role::Parameter, 0), (Role::M, 1), (Role::V, 2)] {
            let mut data = vec![0.0; slice.num_elements() as usize];
            init::fill(model, seed, &tensor, first, &mut data);
            slices.push((slice.clone(), role, data));
        }
    }
    slices
}
