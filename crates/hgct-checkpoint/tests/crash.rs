//! Full disks, loss of power and short writes, at every single change of the disk.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{halves, head, model, write};
use hgct_checkpoint::testing::{Faults, MemoryDisk};
use hgct_checkpoint::{Checkpoints, Error, LocalStore};

fn on(disk: &MemoryDisk) -> Checkpoints {
    Checkpoints::on(Arc::new(LocalStore::on(Arc::new(disk.clone()), "/run/checkpoints")))
}

/// A disk with the checkpoint of step 10, after a clean shutdown.
fn with_step_10() -> MemoryDisk {
    let disk = MemoryDisk::new();
    write(&on(&disk), head(10, model()), halves(10, &model()), 2).unwrap();
    disk.restart(0);
    disk
}

fn write_20(disk: &MemoryDisk, keep: usize) -> hgct_checkpoint::Result<()> {
    write(&on(disk), head(20, model()), halves(20, &model()), keep).map(drop)
}

/// Changes of the disk that step 20 takes when nothing fails.
fn changes_of_step_20(keep: usize) -> u64 {
    let disk = with_step_10();
    disk.set_faults(Faults::default());
    write_20(&disk, keep).unwrap();
    disk.changes()
}

fn newest(disk: &MemoryDisk) -> u64 {
    let newest = on(disk).newest_verified().unwrap();
    assert!(newest.bad.is_empty(), "a manifest was visible before its shards: {:?}", newest.bad);
    newest.checkpoint.unwrap().manifest().step
}

#[test]
fn a_disk_that_is_full_at_any_change_names_the_file_and_keeps_the_old_checkpoint() {
    let mut failed = 0;
    for change in 1..=changes_of_step_20(2) {
        let disk = with_step_10();
        disk.set_faults(Faults { no_space_from: Some(change), ..Faults::default() });
        match write_20(&disk, 2) {
            Ok(()) => assert_eq!(newest(&disk), 20),
            Err(error @ Error::NoSpace { .. }) => {
                failed += 1;
                assert!(error.to_string().contains("/run/checkpoints/step-00000020"), "{error}");
                // Nothing of it stays, though the disk is still full.
                assert_eq!(newest(&disk), 10);
                let files = disk.files();
                assert!(
                    files.iter().all(|(path, _)| path.starts_with("/run/checkpoints/step-00000010")),
                    "{files:?}"
                );
                disk.set_faults(Faults::default());
                write_20(&disk, 2).unwrap();
                assert_eq!(newest(&disk), 20);
            }
            Err(other) => panic!("at change {change}: {other}"),
        }
    }
    assert!(failed > 10, "{failed}");
}

#[test]
fn a_full_disk_names_the_bytes() {
    let disk = with_step_10();
    // Folder, its sync, file: the first piece is the fourth change.
    disk.set_faults(Faults { no_space_from: Some(4), ..Faults::default() });
    match write_20(&disk, 2).unwrap_err() {
        Error::NoSpace { path, offset: 0, bytes, .. } => {
            assert_eq!(path, std::path::Path::new("/run/checkpoints/step-00000020/shard-r0.safetensors"));
            assert!(bytes > 1000, "{bytes}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn loss_of_power_at_any_change_leaves_the_old_checkpoint_or_the_new_one() {
    // With one to keep, the old one is being removed at the end.
    for keep in [1, 2] {
        let (mut old, mut new) = (0, 0);
        for change in 1..=changes_of_step_20(keep) {
            for seed in 0..12 {
                let disk = with_step_10();
                disk.set_faults(Faults { power_loss_at: Some(change), ..Faults::default() });
                let committed = write_20(&disk, keep).is_ok();
                disk.restart(seed);
                let found = newest(&disk);
                assert!(found == 20 || (found == 10 && !committed), "change {change}, seed {seed}: {found}");
                *if found == 10 { &mut old } else { &mut new } += 1;
                // The next one finds a usable folder, and leaves nothing but what it should keep.
                write(&on(&disk), head(30, model()), halves(30, &model()), 1).unwrap();
                assert_eq!(on(&disk).steps().unwrap(), [30]);
                let files = disk.files();
                assert!(
                    files.iter().all(|(path, _)| path.starts_with("/run/checkpoints/step-00000030")),
                    "{files:?}"
                );
            }
        }
        assert!(old > 0 && new > 0, "{old} {new}");
    }
}

#[test]
fn loss_of_power_while_one_is_discarded_leaves_no_manifest_without_shards() {
    let with_both = || {
        let disk = with_step_10();
        write_20(&disk, 2).unwrap();
        disk.restart(0);
        disk
    };
    let disk = with_both();
    disk.set_faults(Faults::default());
    on(&disk).discard(20).unwrap();
    assert_eq!(newest(&disk), 10);
    for change in 1..=disk.changes() {
        for seed in 0..12 {
            let disk = with_both();
            disk.set_faults(Faults { power_loss_at: Some(change), ..Faults::default() });
            let _ = on(&disk).discard(20);
            disk.restart(seed);
            newest(&disk);
        }
    }
}

#[test]
fn short_writes_change_nothing() {
    let disk = with_step_10();
    disk.set_faults(Faults { short_writes: Some(7), ..Faults::default() });
    write_20(&disk, 2).unwrap();
    assert_eq!(newest(&disk), 20);
}

#[test]
fn a_disk_that_forgets_to_sync_would_be_found() {
    // The test disk itself: without a sync the content is not sure to be there.
    use hgct_checkpoint::disk::Disk as _;
    let lost = (0..20).any(|seed| {
        let disk = MemoryDisk::new();
        let mut file = disk.create("/file".as_ref()).unwrap();
        file.write(&[1; 100]).unwrap();
        disk.sync_dir("/".as_ref()).unwrap();
        disk.restart(seed);
        disk.files()[0].1 < 100
    });
    assert!(lost);
}
