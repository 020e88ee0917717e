ALTER TABLE "{message}" ADD COLUMN "owner" {uuid};
