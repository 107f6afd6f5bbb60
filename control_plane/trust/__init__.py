"""The signing side of trust: keys, metadata, ceremonies, and the assignments the control plane signs itself.

Two kinds of keys never meet. *Offline*: root (2 of 3, on media in safes) and release (with the person responsible
for models); their ceremonies (`ceremony`) work on a folder and need no control plane. *Online*: timestamp, snapshot and
assign (`online_signer`), on the control plane's disk, signing every hour and with every assignment. A thief of the
online keys can choose among released bundles until the root revokes them, but cannot release one.

`keys` makes and reads key files; `metadata` builds and checks TUF metadata; `signing` packs the signed set within its
limit; `renewal` signs again before anything expires; `export` writes a folder for sites without a network.
"""
