//! Seconds and MB/s of preparing Rust crate sources, and the baselines on them:
//! `cargo run --release -p hgct-data --example data_speed -- REGISTRY_SRC CACHE [VOCAB]`

use std::path::{Path, PathBuf};
use std::time::Instant;

use hgct_data::prepare::Phase;
use hgct_data::registry::{TARGET_BYTES, quickstart_sources};
use hgct_data::{Options, TokenFile, TokenizerChoice, ngram, prepare};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [registry, cache, rest @ ..] = &arguments[..] else {
        return Err("usage: data_speed REGISTRY_SRC CACHE [VOCAB]".into());
    };
    let vocab_size = rest.first().map_or(Ok(2048), |vocab| vocab.parse())?;
    let start = Instant::now();
    let sources = quickstart_sources(Path::new(registry), None, TARGET_BYTES)?;
    println!("choose: {} files in {:.2?}", sources.files().len(), start.elapsed());
    let tokenizer = TokenizerChoice::Train { vocab_size, train_bytes: 8 << 20 };
    let cache = PathBuf::from(cache);
    let options = Options { sources, tokenizer, held_out: 0.02, max_bytes: None, threads: 2, cache };
    for _ in 0..2 {
        let start = Instant::now();
        let (mut phase, mut since, mut done) = (Phase::Scan, start, 0);
        let prepared = prepare(&options, &mut |progress| {
            if progress.phase != phase {
                println!("  {phase:?}: {:.2?} for {done} bytes", since.elapsed());
                (phase, since) = (progress.phase, Instant::now());
            }
            done = progress.done;
        })?;
        let seconds = since.elapsed().as_secs_f64();
        println!("  {phase:?}: {seconds:.2} s, {:.1} MB/s", done as f64 / 1e6 / seconds);
        println!("prepare: {:.2?}, reused {}", start.elapsed(), prepared.reused);
        println!("{:#?}", prepared.meta);
        let start = Instant::now();
        let train = TokenFile::open(&prepared.train_path())?;
        let held_out = TokenFile::open(&prepared.held_out_path())?;
        let baselines = ngram::baselines(&train, &held_out, 128)?;
        println!("{baselines:?} in {:.2?}", start.elapsed());
    }
    Ok(())
}
