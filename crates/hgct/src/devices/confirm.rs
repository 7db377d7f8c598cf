//! Whose hardware a framework's device is.

use std::collections::BTreeSet;

use super::hardware::{Card, Hardware, normal_pci, normal_uuid};
use super::probe::Seen;
use crate::vendors::Vendor;

/// The vendor's card behind a device that a framework sees, or why it is none of them.
///
/// `present` are the vendors whose hardware is on this host, `libraries` what the framework's
/// process has mapped.
pub(super) fn confirm(
    vendor: &Vendor,
    hardware: &Hardware,
    present: &[&Vendor],
    seen: &Seen,
    libraries: &[String],
) -> Result<Card, String> {
    if vendor.recognise.processor {
        return Ok(hardware.cards.first().cloned().unwrap_or_default());
    }
    if vendor.recognise.adapters {
        return adapter(vendor, seen);
    }
    let pci = seen.pci.as_deref().and_then(normal_pci);
    let uuid = seen.uuid.as_deref().and_then(normal_uuid);
    let same = |card: &&Card| pci.is_some() && card.pci == pci || uuid.is_some() && card.uuid == uuid;
    if let Some(card) = hardware.cards.iter().find(same) {
        return Ok(card.clone());
    }
    let comparable =
        |card: &Card| pci.is_some() && card.pci.is_some() || uuid.is_some() && card.uuid.is_some();
    if hardware.cards.iter().any(comparable) {
        let id = pci.or(uuid).unwrap_or_default();
        return Err(format!(
            "`{}` is other hardware there: {id} is no card of {}",
            seen.device, vendor.title
        ));
    }
    let owners: BTreeSet<&str> = present
        .iter()
        .filter(|other| has_library(other, libraries))
        .map(|other| other.title.as_str())
        .collect();
    if !owners.contains(vendor.title.as_str()) {
        return Err(format!(
            "nothing shows that `{}` is hardware of {}: the process has mapped none of {}",
            seen.device,
            vendor.title,
            vendor.recognise.libraries.join(", ")
        ));
    }
    if owners.len() > 1 {
        let owners: Vec<_> = owners.into_iter().collect();
        return Err(format!(
            "`{}` may be hardware of any of {}: give each an environment of its own",
            seen.device,
            owners.join(", ")
        ));
    }
    let card = hardware.cards.get(seen.index as usize).cloned();
    // Where only the framework counts the cards, what it knows of them is all there is.
    let (name, memory_bytes) = (seen.name.clone(), seen.memory_bytes);
    Ok(card.unwrap_or(Card { pci, uuid, file: None, name, memory_bytes }))
}

/// An adapter is its own witness: what lists it drives it.
fn adapter(vendor: &Vendor, seen: &Seen) -> Result<Card, String> {
    match &seen.error {
        Some(reason) => Err(reason.clone()),
        None => Ok(Card {
            pci: seen.pci.as_deref().and_then(normal_pci),
            uuid: seen.uuid.as_deref().and_then(normal_uuid),
            // Without a place on the bus its name is what tells it from others.
            file: Some(if seen.software { vendor.title.clone() } else { seen.device.clone() }),
            name: seen.name.clone(),
            memory_bytes: seen.memory_bytes,
        }),
    }
}

fn has_library(vendor: &Vendor, libraries: &[String]) -> bool {
    vendor
        .recognise
        .libraries
        .iter()
        .any(|begin| libraries.iter().any(|name| name.starts_with(begin.as_str())))
}
