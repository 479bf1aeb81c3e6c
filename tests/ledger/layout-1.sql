-- A ledger in layout 1, with one run, as `sqlite3 FILE .dump` shows it.
PRAGMA application_id = 1297110083;
BEGIN TRANSACTION;
CREATE TABLE conform_anchor (
	run TEXT NOT NULL, 
	pinned TEXT NOT NULL, 
	release TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	PRIMARY KEY (run, pinned), 
	FOREIGN KEY(run) REFERENCES conform_run (id)
);
CREATE TABLE conform_ledger (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "conform_ledger" VALUES(1);
CREATE TABLE conform_run (
	id TEXT NOT NULL, 
	created TEXT NOT NULL, 
	"commit" TEXT NOT NULL, 
	subject TEXT NOT NULL, 
	name TEXT NOT NULL, 
	target TEXT NOT NULL, 
	dtype TEXT NOT NULL, 
	device TEXT NOT NULL, 
	driver TEXT NOT NULL, 
	fault TEXT NOT NULL, 
	checkpoint TEXT NOT NULL, 
	checkpoint_path TEXT NOT NULL, 
	certificate TEXT NOT NULL, 
	seeds TEXT NOT NULL, 
	tvm TEXT NOT NULL, 
	torch TEXT NOT NULL, 
	transformers TEXT NOT NULL, 
	environment TEXT NOT NULL, 
	verdict TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	reproduce TEXT NOT NULL, 
	seconds FLOAT NOT NULL, 
	details BLOB NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "conform_run" VALUES('20260101T000000-00000001','2026-01-01T00:00:00.000001+00:00','0000000000000000000000000000000000000001','relax','relax-llvm','llvm','float16','a processor','','','abababababababababababababababababababababababababababababababab','somewhere/tiny','','{"prompts": 1}','1','2','3','{"python": "3.11", "threads": "1"}','conforms','','mpt-conform check',1.5,X'78DAAB562A4A2DC82F2A51B2AA562A492C2856B28A8ED551CA2BCD4D4A2D52B232ACAD0500C4180B5D');
CREATE TABLE conform_value (
	run TEXT NOT NULL, 
	mode TEXT NOT NULL, 
	tap TEXT NOT NULL, 
	metric TEXT NOT NULL, 
	layer INTEGER, 
	statistic TEXT NOT NULL, 
	value FLOAT, 
	PRIMARY KEY (run, mode, tap, metric), 
	FOREIGN KEY(run) REFERENCES conform_run (id)
)
 WITHOUT ROWID

;
INSERT INTO "conform_value" VALUES('20260101T000000-00000001','local','logits','of_limit',2,'rms',1.25);
INSERT INTO "conform_value" VALUES('20260101T000000-00000001','local','transformer.blocks.0.norm_1','of_limit',1,'rms',1.125);
INSERT INTO "conform_value" VALUES('20260101T000000-00000001','local','transformer.wte','of_limit',NULL,'rms',1.0);
CREATE INDEX conform_run_cell ON conform_run (subject, target, dtype, checkpoint, created);
COMMIT;
PRAGMA journal_mode = WAL;
