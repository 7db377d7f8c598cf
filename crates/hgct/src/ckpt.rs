//! `hgct ckpt`: what is in a checkpoint, and its export to others' forms.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use hgct_checkpoint::{Checkpoint, Checkpoints, ExportOptions, ExportTokenizer, Exported, export_hf};
use hgct_core::canonical;
use hgct_data::blocks::sha256_file;
use hgct_data::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::output::print;
use crate::workspace::Workspace;

/// `hgct ckpt`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hgct ckpt inspect latest\n  hgct ckpt export latest --to hf --output model"
)]
pub(crate) struct CkptArgs {
    #[command(subcommand)]
    command: CkptCommand,
}

#[derive(Debug, Subcommand)]
enum CkptCommand {
    /// Verify a checkpoint and show what is in it
    #[command(
        after_help = "Examples:\n  hgct ckpt inspect latest\n  hgct ckpt inspect .hgct/runs/ID/checkpoints/step-00000060 --json"
    )]
    Inspect {
        /// A run's id, `latest`, or the path of a run, of its checkpoints or of one of them
        checkpoint: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a checkpoint in another form
    #[command(after_help = "Example:\n  hgct ckpt export latest --to hf --output model")]
    Export {
        /// A run's id, `latest`, or the path of a run, of its checkpoints or of one of them
        checkpoint: String,
        /// The form
        #[arg(long, value_enum)]
        to: Form,
        /// The folder to write; it must be new or empty
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        /// The `tokenizer.json`; found by its hash in the data cache where it is not given
        #[arg(long, value_name = "FILE")]
        tokenizer: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Forms of an export.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Form {
    /// A folder that `transformers` loads
    Hf,
}

pub(crate) fn run(workspace: &Workspace, args: &CkptArgs) -> Result<u8> {
    match &args.command {
        CkptCommand::Inspect { checkpoint, json } => {
            let summary = find(workspace, checkpoint)?.summary();
            print(&if *json { canonical::encode(&summary) } else { format!("{summary}\n") })?;
        }
        CkptCommand::Export { checkpoint, to: Form::Hf, output, tokenizer, json } => {
            let checkpoint = find(workspace, checkpoint)?;
            let tokenizer = match tokenizer {
                Some(path) => Some(path.clone()),
                None => kept_tokenizer(workspace, &checkpoint)?,
            };
            let tokenizer = match tokenizer {
                None => None,
                Some(path) => {
                    let config_json = Some(Tokenizer::open(&path, None)?.config_json());
                    Some(ExportTokenizer { path, config_json })
                }
            };
            let exported = export_hf(&checkpoint, tokenizer.as_ref(), output, &ExportOptions::default())?;
            if *json {
                print(&canonical::encode(&document(&exported)))?;
            } else {
                print(&format!(
                    "{}: {} ({} bytes of tensors)\n",
                    exported.path,
                    exported.files.join(", "),
                    exported.size_bytes
                ))?;
            }
        }
    }
    Ok(0)
}

/// What was exported, a row a file.
fn document(exported: &Exported) -> Value {
    let rows: Vec<Value> = exported.files.iter().map(|file| json!({ "file": file })).collect();
    json!({ "path": exported.path, "rows": rows, "size_bytes": exported.size_bytes })
}

/// The checkpoint that a person names; the newest that verifies where the name is a run's.
fn find(workspace: &Workspace, name: &str) -> Result<Checkpoint> {
    let path = if Path::new(name).join("checkpoints").is_dir() {
        Path::new(name).join("checkpoints")
    } else if Path::new(name).is_dir() {
        PathBuf::from(name)
    } else {
        workspace.find_run(name)?.join("checkpoints")
    };
    let (checkpoints, step) = Checkpoints::find(&path)?;
    if let Some(step) = step {
        return Ok(checkpoints.verify(step)?);
    }
    match newest_verified(&checkpoints)? {
        Some(checkpoint) => Ok(checkpoint),
        None => bail!("{} has no checkpoint that verifies", path.display()),
    }
}

/// The newest checkpoint that verifies; says which newer ones are passed over, and why.
pub(crate) fn newest_verified(checkpoints: &Checkpoints) -> Result<Option<Checkpoint>> {
    let newest = checkpoints.newest_verified()?;
    for bad in &newest.bad {
        eprintln!(
            "hgct: the checkpoint of step {} is passed over: {}: {}",
            bad.step,
            bad.path.display(),
            bad.reason
        );
    }
    Ok(newest.checkpoint)
}

/// The tokenizer that the manifest names, from the cache of prepared data.
fn kept_tokenizer(workspace: &Workspace, checkpoint: &Checkpoint) -> Result<Option<PathBuf>> {
    let Some(wanted) = &checkpoint.manifest().tokenizer else { return Ok(None) };
    let folders = std::fs::read_dir(workspace.data()).map(|entries| entries.flatten().collect::<Vec<_>>());
    for folder in folders.unwrap_or_default() {
        let path = folder.path().join("tokenizer.json");
        if path.is_file() && sha256_file(&path)?.0 == *wanted {
            return Ok(Some(path));
        }
    }
    eprintln!(
        "hgct: the tokenizer {} is not in the cache: export without it, or name it with --tokenizer",
        wanted.short()
    );
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_has_a_row_a_file() {
        let files = vec!["config.json".into(), "model.safetensors".into()];
        let printed = document(&Exported { path: "out".into(), files, size_bytes: 8 });
        assert_eq!(printed["rows"][1]["file"], "model.safetensors");
    }
}
